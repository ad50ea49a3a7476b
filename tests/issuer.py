"""An issuer of tokens: its keys, and a real HTTPS server that publishes them under a certificate of its own."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ISSUER, AUDIENCE = "https://issuer.example", "classifier"


class Issuer:
    """Signs tokens; the public half of its key is in `document`, and in a file where one is named."""

    def __init__(self, path: Path | None = None, key_id: str = "1") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.key_id = key_id
        self.jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key())) | {
            "kid": key_id,
            "alg": "ES256",
        }
        self.document = json.dumps({"keys": [self.jwk]})
        if path is not None:
            path.write_text(self.document)

    def sign(self, header: dict[str, Any] | None = None, **changes: Any) -> str:
        """Sign a token with claims that are as they should be, but for the changes; None leaves one out."""
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "carol", "exp": time.time() + 60} | changes
        present = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(present, self.key, algorithm="ES256", headers={"kid": self.key_id, **(header or {})})


def write_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 that signs itself, with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


class KeyServer(http.server.ThreadingHTTPServer):
    """Publishes what `content` says.

    Attributes:
        content: of each answer.
        status: of each answer.
        location: where a redirect leads.
        asked: the paths that were asked for.
        is_open: answers wait until it is set.
        part_s: seconds between two bytes of an answer.
    """

    daemon_threads = True

    def __init__(self, certificate: Path, content: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.content = content
        self.status = 200
        self.location = ""
        self.asked: list[str] = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.part_s = 0.0
        self.url = f"https://127.0.0.1:{self.server_port}/jwks.json"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: KeyServer

    def do_GET(self) -> None:  # noqa: N802  # as http.server calls it
        server = self.server
        server.asked.append(self.path)
        server.is_open.wait(30)
        content = server.content.encode()
        self.send_response(server.status)
        if server.location:
            self.send_header("Location", server.location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if not server.part_s:
                self.wfile.write(content)
                return
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(server.part_s)
        except OSError:  # the client has heard enough
            pass

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def publishing(certificate: Path, content: str) -> Iterator[KeyServer]:
    """Publish a key set at an https address until the block ends."""
    server = KeyServer(certificate, content)
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a handshake that the client ends
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.is_open.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so that other threads bring about."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
