"""Write requests for people to send, from the server's description: python -m tests.samples.

`docs/requests/` gets a Postman collection, an .http file, and the bodies that both send; image.png is there.
JPEG, WebP and BMP go as PNG does, so there is one request for all image files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import PROJECT

FOLDER = PROJECT / "docs" / "requests"
DESCRIPTION = PROJECT / "docs" / "openapi.json"
SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
VARIABLES = {"base_url": "http://127.0.0.1:8000", "key": "none", "model": "image_classifier", "version": "see-model"}
READ_MODEL = [
    f'pm.collectionVariables.set("{name}", pm.response.json().{fact});'
    for name, fact in (("model", "name"), ("version", "version"))
]
CHECK = 'pm.test("status 200", () => pm.response.to.have.status(200));'


@dataclass(frozen=True)
class Sample:
    """A request.

    Attributes:
        body: file in the folder that holds its body.
        form: fields of a form, `image` being a file.
    """

    name: str
    method: str
    path: str
    is_open: bool
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The address, with variables."""
        query = "&".join(f"{name}={value}" for name, value in self.query.items())
        return f"{{{{base_url}}}}{self.path}" + (f"?{query}" if query else "")


def list_samples(description: Mapping[str, Any]) -> Iterator[Sample]:
    """List a request for each operation and each kind of body, without those of pages."""
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            kinds = operation["responses"]["200"].get("content", {})
            if any(kind.startswith(("text/html", "text/css", "text/javascript", "image/")) for kind in kinds):
                continue
            named = path.replace("{model}", "{{model}}").replace("{version}", "{{version}}")
            is_open = operation.get("security") == []
            bodies = operation.get("requestBody", {}).get("content", {})
            for kind in [kind for kind in bodies if not kind.startswith("image/") or kind == "image/png"] or [""]:
                name = operation["summary"] + (f": {kind}" if kind else "") + (", by version" * ("{version}" in path))
                yield Sample(name, method.upper(), named, is_open, **_build_body(path, kind))


def _build_body(path: str, kind: str) -> dict[str, Any]:
    headers = {"Content-Type": kind}
    if path == "/predict" and kind == "multipart/form-data":
        return {"form": {"image": "image.png", "top_k": "3"}}
    if path == "/predict":
        body = {"image/png": "image.png", "application/json": "predict.json"}.get(kind, "pixels.bin")
        return {"headers": headers, "body": body, "query": {} if body == "predict.json" else {"top_k": "3"}}
    if kind == "application/octet-stream":
        length = str(len(build_tensor_head()))
        return {"headers": {**headers, "Inference-Header-Content-Length": length}, "body": "infer.bin"}
    return {"headers": headers, "body": "infer.json"} if kind else {}


def read_pixels() -> bytes:
    """Read the pixels of image.png: uint8 [32, 32, 3]."""
    with Image.open(FOLDER / "image.png") as image:
        return np.asarray(image.convert("RGB")).tobytes()


def build_tensor_head() -> bytes:
    """Build the JSON that stands before a binary tensor."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    return json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 3072}}]}).encode()


def build_bodies() -> dict[str, bytes]:
    """Build the files with bodies, by name."""
    pixels, image = read_pixels(), base64.b64encode((FOLDER / "image.png").read_bytes()).decode()
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": list(pixels)}
    return {
        "pixels.bin": pixels,
        "predict.json": json.dumps({"images": [image], "top_k": 3}).encode() + b"\n",
        "infer.json": json.dumps({"inputs": [tensor]}).encode() + b"\n",
        "infer.bin": build_tensor_head() + pixels,
    }


def build_collection(description: Mapping[str, Any]) -> dict[str, Any]:
    """Build the Postman collection; each request is tested to get 200."""
    items = []
    for sample in list_samples(description):
        script = [CHECK] + (READ_MODEL if sample.path == "/model" else [])
        request: dict[str, Any] = {
            "method": sample.method,
            "header": [{"key": name, "value": value} for name, value in sample.headers.items()],
            "url": {
                "raw": sample.url,
                "host": ["{{base_url}}"],
                "path": sample.path.strip("/").split("/"),
                "query": [{"key": name, "value": value} for name, value in sample.query.items()],
            },
        }
        if sample.is_open:
            request["auth"] = {"type": "noauth"}
        if sample.body:
            request["body"] = {"mode": "file", "file": {"src": sample.body}}
        if sample.form:
            fields = [
                (
                    {"key": name, "type": "file", "src": value, "contentType": "image/png"}
                    if name == "image"
                    else {"key": name, "type": "text", "value": value}
                )
                for name, value in sample.form.items()
            ]
            request["body"] = {"mode": "formdata", "formdata": fields}
        event = {"listen": "test", "script": {"type": "text/javascript", "exec": script}}
        items.append({"name": sample.name, "event": [event], "request": request})
    info = {"name": description["info"]["title"], "version": description["info"]["version"], "schema": SCHEMA}
    bearer = [{"key": "token", "value": "{{key}}", "type": "string"}]
    variables = [{"key": name, "value": value} for name, value in VARIABLES.items()]
    return {"info": info, "auth": {"type": "bearer", "bearer": bearer}, "variable": variables, "item": items}


def build_http(description: Mapping[str, Any]) -> str:
    """Build the .http file, as the editors of JetBrains and the REST Client of Visual Studio Code read it."""
    texts = ["\n".join(f"@{name} = {value}" for name, value in VARIABLES.items())]
    for sample in list_samples(description):
        lines = [f"### {sample.name}", f"{sample.method} {sample.url}"]
        if not sample.is_open:
            lines.append("Authorization: Bearer {{key}}")
        lines += [f"{name}: {value}" for name, value in sample.headers.items()]
        if sample.body:
            lines += ["", f"< ./{sample.body}"]
        if sample.form:
            lines += ["Content-Type: multipart/form-data; boundary=part", ""]
            for name, value in sample.form.items():
                is_file = name == "image"
                about = f'; filename="{value}"\nContent-Type: image/png' if is_file else ""
                lines += ["--part", f'Content-Disposition: form-data; name="{name}"{about}', ""]
                lines.append(f"< ./{value}" if is_file else value)
            lines.append("--part--")
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def build_files() -> dict[str, bytes]:
    """Build all files of the folder but image.png, by name."""
    description = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    collection = json.dumps(build_collection(description), indent=2) + "\n"
    http = build_http(description)
    return {**build_bodies(), "postman.json": collection.encode(), "requests.http": http.encode()}


def write(folder: Path = FOLDER) -> None:
    """Write them."""
    for name, content in build_files().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    write()
