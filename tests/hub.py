"""A server with the part of the Hugging Face Hub's interface that a push uses; it keeps repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """Repositories by name, each with its files; messages of commits; and what was uploaded for one to come."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Apply a commit's lines."""
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self, document: Any, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub, path = self.hub, self.path.partition("?")[0]
        if self.command == "PUT" and (match := re.fullmatch(r"/uploads/(\w+)", path)):
            hub.uploads[match[1]] = body
            assert hashlib.sha256(body).hexdigest() == match[1]
            return self._answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}"
            if name in hub.repositories:
                return self._answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = {".gitattributes": b""}
            hub.private |= {name} if wish.get("visibility") == "private" else set()
            return self._answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|preupload|commit)/main", path):
            return self._handle_repository(match[1], match[2], body)
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**wish, "actions": {"upload": {"href": f"{hub.url}/uploads/{wish['oid']}"}}}
                for wish in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        return self._answer({"error": f"{self.command} {path} is not known here"}, 404)

    def _handle_repository(self, name: str, what: str, body: bytes) -> None:
        hub = self.hub
        if name not in hub.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        match what:
            case "tree":
                files = hub.repositories[name].items()
                entries = [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files]
                return self._answer(entries)
            case "preupload":
                paths = [wish["path"] for wish in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                found = [
                    {"path": path, "uploadMode": modes[path.endswith(".onnx")], "shouldIgnore": False} for path in paths
                ]
                return self._answer({"files": found})
            case _:
                hub.commit(name, [json.loads(line) for line in body.splitlines()])
                oid = hashlib.sha1(str(len(hub.messages)).encode(), usedforsecurity=False).hexdigest()
                return self._answer({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Answer as the Hub does until the block ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
