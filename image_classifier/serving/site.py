"""What people look at in a browser: the page at `/` and the documents at `/docs`; no script or style from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from image_classifier.serving.openapi import build_openapi

FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PATHS = frozenset((*FILES, "/docs", "/openapi.json"))
"""What anybody may see: it says nothing that the package does not."""

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


def build_routes() -> list[Route]:
    """Build the routes of the page and the documents."""
    folder = resources.files("image_classifier") / "serving" / "page"
    contents = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    async def show_file(request: Request) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        content, kind = contents[path]
        return Response(content, headers=HEADERS, media_type=kind)

    async def show_documents(request: Request) -> Response:
        return Response(build_documents(build_openapi()), headers=HEADERS, media_type="text/html")

    return [*(Route(path, show_file) for path in FILES), Route("/docs", show_documents)]


def build_documents(openapi: dict[str, Any]) -> str:
    """Build a page out of an OpenAPI description: each operation with what it takes and answers."""
    return "".join(_iterate_documents(openapi))


def _iterate_documents(openapi: dict[str, Any]) -> Iterator[str]:
    info = openapi["info"]
    title = html.escape(info["title"])
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{title}</title><link rel="stylesheet" href="page/style.css">'
    yield '<link rel="icon" href="page/icon.svg"></head><body class="documents"><main>'
    yield f"<h1>{title} <small>{html.escape(info['version'])}</small></h1><p>{html.escape(info['description'])}</p>"
    yield '<p><a href="openapi.json">openapi.json</a> · <a href="./">try it</a></p>'
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
            rows = [(status, _find_description(openapi, answer)) for status, answer in operation["responses"].items()]
            yield from _iterate_table("answer", rows)
            yield "</section>"
    yield "</main></body></html>"


def _find_description(openapi: dict[str, Any], answer: dict[str, Any]) -> str:
    if "$ref" in answer:
        answer = openapi["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    return str(answer["description"])


def _iterate_table(heading: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield f"<table><tr><th>{heading}</th><th></th></tr>"
        for name, text in rows:
            yield f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(text)}</td></tr>"
        yield "</table>"
