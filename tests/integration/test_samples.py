"""The requests for people in docs/requests/: up to date, and answered by a running server."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from tests.conftest import PROJECT, require_program, run_program
from tests.samples import DESCRIPTION, FOLDER, build_files
from tests.serving import Running, serving, write_model

KEY = "alices-key"
SCRIPTS = ("app", "card", "docs")
PAGES = {"/", "/docs", "/page/style.css", "/page/icon.svg", "/samples.png", *(f"/page/{name}.js" for name in SCRIPTS)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a key."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    model = write_model(folder / "model.onnx")
    with serving(model, folder / "log", "--api_keys_file", folder / "keys") as running:
        yield running


@pytest.fixture
def variables(server: Running) -> dict[str, str]:
    """What the variables of the requests stand for."""
    facts = httpx.get(f"{server.url}/model", headers={"x-api-key": KEY}).json()
    return {"base_url": server.url, "key": KEY, "model": facts["name"], "version": facts["version"]}


def fill(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: variables[match[1]], text)


def get_operations() -> set[tuple[str, str]]:
    """Get the operations that the description has, without those of pages."""
    paths = json.loads(DESCRIPTION.read_text())["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations if path not in PAGES}


def get_operation(method: str, raw: str) -> tuple[str, str]:
    return method, raw.removeprefix("{{base_url}}").partition("?")[0].replace("{{", "{").replace("}}", "}")


def test_they_are_what_the_description_gives() -> None:
    files = build_files()
    assert {path.name for path in FOLDER.iterdir()} == {*files, "image.png"}
    for name, content in files.items():
        assert (FOLDER / name).read_bytes() == content, "python -m tests.samples"


def send_item(client: httpx.Client, item: Mapping[str, Any], variables: Mapping[str, str]) -> httpx.Response:
    """Send an item of the collection as Postman does."""
    request = item["request"]
    url, body = request["url"], request.get("body", {})
    assert url["raw"].startswith("/".join([*url["host"], *url["path"]]))
    headers = {entry["key"]: entry["value"] for entry in request["header"]}
    if request.get("auth", {}).get("type") != "noauth":
        headers["Authorization"] = f"Bearer {variables['key']}"
    options: dict[str, Any] = {}
    match body.get("mode"):
        case "file":
            options["content"] = (FOLDER / body["file"]["src"]).read_bytes()
        case "formdata":
            fields = body["formdata"]
            options["data"] = {each["key"]: each["value"] for each in fields if each["type"] == "text"}
            options["files"] = {
                each["key"]: (each["src"], (FOLDER / each["src"]).read_bytes(), each["contentType"])
                for each in fields
                if each["type"] == "file"
            }
    query = {entry["key"]: entry["value"] for entry in url["query"]}
    address = fill("/".join([*url["host"], *url["path"]]), variables)
    return client.request(request["method"], address, params=query, headers=headers, **options)


def test_the_collection_asks_every_operation(variables: dict[str, str]) -> None:
    collection = json.loads((FOLDER / "postman.json").read_text())
    asked = {get_operation(item["request"]["method"], item["request"]["url"]["raw"]) for item in collection["item"]}
    assert asked == get_operations()
    assert {entry["key"] for entry in collection["variable"]} == variables.keys()
    with httpx.Client() as client:
        for item in collection["item"]:
            answer = send_item(client, item, variables)
            assert answer.status_code == 200, f"{item['name']}: {answer.text}"


def read_body(text: str) -> bytes:
    """Read a body of an .http file: lines, of which `< FILE` stands for a file; with a CRLF between those of a form."""
    lines = text.split("\n")
    parts = [
        (FOLDER / line.removeprefix("< ./")).read_bytes() if line.startswith("< ./") else line.encode()
        for line in lines
    ]
    return b"\r\n".join(parts)


def test_the_http_file_asks_every_operation(variables: dict[str, str]) -> None:
    head, *requests = (FOLDER / "requests.http").read_text().rstrip("\n").split("\n\n###")
    assert set(re.findall(r"^@(\w+) = ", head, flags=re.MULTILINE)) == variables.keys()
    asked = set()
    with httpx.Client() as client:
        for text in requests:
            above, _, body = text.partition("\n\n")
            _, line, *headers = above.split("\n")
            method, raw = line.split(" ")
            asked.add(get_operation(method, raw))
            named = dict(fill(header, variables).split(": ", 1) for header in headers)
            content = read_body(body) if body else None
            answer = client.request(method, fill(raw, variables), headers=named, content=content)
            assert answer.status_code == 200, f"{text}: {answer.text}"
    assert asked == get_operations()


def read_curl_lines() -> list[str]:
    """Read the curl lines of docs/client.md."""
    text = (PROJECT / "docs" / "client.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^curl .+$", text, flags=re.MULTILINE)


def test_the_curl_lines_are_answered(server: Running) -> None:
    curl = require_program("curl")
    lines = read_curl_lines()
    assert len(lines) >= 5
    for line in lines:
        command = line.replace("curl ", f"{curl} --fail --silent --show-error ", 1).replace(
            "http://127.0.0.1:8000", server.url
        )
        assert run_program("bash", "-c", command, cwd=PROJECT, key=KEY), line


def test_the_example_in_python_prints_three_classes(server: Running) -> None:
    (code,) = re.findall(
        r"^```python\n(.+?)^```", (PROJECT / "docs" / "client.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert 'Client("http://127.0.0.1:8000")' in code
    code = code.replace('"http://127.0.0.1:8000"', f'"{server.url}", key="{KEY}"')
    assert len(run_program(sys.executable, "-c", code, cwd=PROJECT).splitlines()) == 3
