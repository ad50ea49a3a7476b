"""The demo page at `/` and the API documentation at `/docs`. All scripts and styles come from this server."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response

from image_classifier.serving.routes import add_route

FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/card.js": ("card.js", "text/javascript"),
    "/page/docs.js": ("docs.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_routes(api: FastAPI, describe: Callable[[], dict[str, Any]]) -> None:
    """Add the routes of the demo page and of the API documentation.

    Args:
        describe: returns the OpenAPI document.
    """
    folder = resources.files("image_classifier") / "serving" / "page"
    for path, (name, kind) in FILES.items():
        show = _build_show((folder / name).read_bytes(), kind)
        show.__name__ = f"page_{name.partition('.')[0]}"
        add_route(api, path, show, f"Demo page: {name}", kind, is_open=True)

    async def docs() -> Response:
        return Response(build_documents(describe()), headers=HEADERS, media_type="text/html")

    add_route(api, "/docs", docs, "This API as a web page", "text/html", is_open=True)


def _build_show(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def show() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return show


def build_documents(openapi: dict[str, Any]) -> str:
    """Build an HTML page of an OpenAPI document: each operation with its parameters, bodies, answers and a form."""
    return "".join(_iterate_documents(openapi))


def _iterate_documents(openapi: dict[str, Any]) -> Iterator[str]:
    info = openapi["info"]
    title = html.escape(info["title"])
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{title}</title><link rel="stylesheet" href="page/style.css">'
    yield '<meta name="color-scheme" content="light dark"><link rel="icon" href="page/icon.svg">'
    yield '<script src="page/docs.js" defer></script></head><body class="documents"><main>'
    yield f"<h1>{title} <small>{html.escape(info['version'])}</small></h1><p>{html.escape(info['description'])}</p>"
    yield '<p><a href="openapi.json">openapi.json</a> · <a href="./">demo page</a></p>'
    yield '<form id="key-form"><label for="key">API key or token, if the server needs one</label><div class="row">'
    yield '<input id="key" type="password" autocomplete="off"><button>Use it</button></div></form>'
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            if method == "parameters":
                continue
            yield f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
            yield f"<p>{html.escape(operation['summary'])}</p>"
            parameters = [*operations.get("parameters", []), *operation.get("parameters", [])]
            rows = [(item["name"], f"{item['in']}: {item.get('description', '')}") for item in parameters]
            yield from _iterate_table("parameter", rows)
            body = operation.get("requestBody", {}).get("content", {})
            rows = [(kind, media["schema"].get("description", "")) for kind, media in body.items()]
            yield from _iterate_table("body", rows)
            yield from _iterate_form(method.upper(), path, parameters, list(body))
            rows = [(status, _find_description(openapi, answer)) for status, answer in operation["responses"].items()]
            yield "<details><summary>Answers</summary>"
            yield from _iterate_table("status", sorted(rows))
            yield "</details></section>"
    yield "</main></body></html>"


def _find_description(openapi: dict[str, Any], answer: dict[str, Any]) -> str:
    if "$ref" in answer:
        answer = openapi["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    return str(answer["description"])


def _iterate_table(heading: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield f'<table><tr><th scope="col">{heading}</th><th scope="col">description</th></tr>'
        for name, text in rows:
            yield f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(text)}</td></tr>"
        yield "</table>"


def _iterate_form(method: str, path: str, parameters: list[dict[str, Any]], types: list[str]) -> Iterator[str]:
    """Build the form that `page/docs.js` sends: a field for each parameter, and a body."""
    yield f'<form class="try" data-method="{method}" data-path="{html.escape(path)}">'
    for item in parameters:
        name, hint = html.escape(item["name"]), html.escape(str(item["schema"].get("default", "")).lower())
        facts = f'name="{name}" data-in="{item["in"]}" placeholder="{hint}" autocomplete="off"'
        yield f"<label>{name} <input {facts}{' required' if item.get('required') else ''}></label>"
    if types:
        options = "".join(f"<option>{html.escape(name)}</option>" for name in types)
        yield f'<label>Content-Type <select name="type">{options}</select></label>'
        yield '<label class="file">file <input name="file" type="file"></label>'
        yield '<label class="text" hidden>JSON <textarea name="text" rows="5" spellcheck="false"></textarea></label>'
    operation = f"{method} {html.escape(path)}"
    yield f'<button aria-label="Send {operation}">Send</button><p class="status" role="status"></p>'
    yield f'<pre tabindex="0" role="group" aria-label="Answer of {operation}" hidden></pre>'
    yield f'<img alt="Answer of {operation}" hidden></form>'
