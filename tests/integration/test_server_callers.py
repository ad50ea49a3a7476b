"""Who may ask a running server, and how much: keys that change, tokens of an issuer, limits by caller, and the log."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import PROJECT
from tests.issuer import AUDIENCE, ISSUER, Issuer, publishing, wait_for, write_certificate
from tests.serving import PIXELS, Running, draw_images, encode, read_answer, serving, write_model

BODY = draw_images(1)[0].tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


def write_keys(path: Path, *names: str) -> Path:
    """Write a file with keys that are the names of their owners."""
    path.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names))
    return path


def ask(
    server: Running, credential: str = "", body: bytes = BODY, kind: str = PIXELS["content-type"]
) -> httpx.Response:
    headers = {"content-type": kind} | ({"authorization": f"Bearer {credential}"} if credential else {})
    return httpx.post(f"{server.url}/predict", content=body, headers=headers)


def read_reloads(server: Running, credential: str, result: str) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"x-api-key": credential}).text
    name = f'image_classifier_key_reloads_total{{option="api_keys_file",result="{result}"}} '
    (value,) = (line.removeprefix(name) for line in text.splitlines() if line.startswith(name))
    return float(value)


def test_a_key_that_was_removed_is_refused_without_a_restart(model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", "alice", "bob")
    with serving(model, tmp_path / "log", "--api_keys_file", keys, "--reload_every_s", "0.2") as server:
        assert ask(server, "alice").status_code == ask(server, "bob").status_code == 200
        write_keys(keys, "bob", "carol")
        wait_for(lambda: ask(server, "alice").status_code == 401)
        assert ask(server, "bob").status_code == ask(server, "carol").status_code == 200
        keys.write_text("bob:")
        wait_for(lambda: read_reloads(server, "bob", "failed") > 0)
        assert ask(server, "bob").status_code == ask(server, "carol").status_code == 200
    assert "reloading the API keys failed, the previous ones stay valid" in server.log.read_text()


def test_sighup_has_the_keys_read_again(model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", "alice", "bob")
    with serving(model, tmp_path / "log", "--api_keys_file", keys, "--reload_every_s", "0") as server:
        assert ask(server, "alice").status_code == 200
        write_keys(keys, "bob")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: ask(server, "alice").status_code == 401)
        assert ask(server, "bob").status_code == 200


def test_tokens_of_a_withdrawn_key_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, issuer = write_certificate(tmp_path), Issuer()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with publishing(certificate, issuer.document) as key_server:
        options = ("--jwt_issuer", ISSUER, "--jwt_audience", AUDIENCE, "--jwt_jwks", key_server.url)
        with serving(model, tmp_path / "log", *options, "--reload_every_s", "0") as server:
            token = issuer.sign()
            assert ask(server, token).status_code == 200 and ask(server, "x").status_code == 401
            renewed = Issuer(key_id="2")
            key_server.content = renewed.document
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: ask(server, token).status_code == 401)
            assert ask(server, renewed.sign()).status_code == 200
            key_server.is_open.clear()
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: len(key_server.asked) == 3)
            assert ask(server, renewed.sign()).status_code == 200  # while the issuer is silent


def test_an_issuer_without_tls_is_refused_in_one_line(model: Path) -> None:
    words = ["--jwt_issuer", ISSUER, "--jwt_audience", AUDIENCE, "--jwt_jwks", "http://issuer.example/jwks.json"]
    command = [sys.executable, "-m", "image_classifier", "serve", str(model), *words]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "--jwt_jwks takes a file, or an https URL" in result.stderr


def check_refusal(answer: httpx.Response, kind: str = "rate-limited") -> None:
    """Check that an answer says that the caller comes too often, and when it may come again."""
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["type"] == f"urn:image-classifier:problem:{kind}"


def test_a_caller_that_comes_too_often_is_told_when_to_come_again(model: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", "alice", "bob", "carol", "dora", "observer")
    options = ("--api_keys_file", keys, "--rate_limit", "0.001")
    with serving(model, tmp_path / "log", *options) as server:
        assert ask(server, "alice").status_code == 200
        for body, kind in ((BODY, PIXELS["content-type"]), (2 * BODY, PIXELS["content-type"]), (b"x", "image/png")):
            check_refusal(ask(server, "alice", body, kind))
        check_refusal(httpx.get(f"{server.url}/model", headers={"x-api-key": "alice"}))
        answer = httpx.get(f"{server.url}/v2", headers={"x-api-key": "alice"})
        assert answer.status_code == 429 and "error" in answer.json()
        assert ask(server, "bob", 2 * BODY).status_code == 200  # not one of those with one small image
        check_refusal(ask(server, "bob"))
        for _ in range(3):
            assert httpx.get(f"{server.url}/health/ready").status_code == 200
            assert httpx.get(f"{server.url}/docs").status_code == 200
        text = httpx.get(f"{server.url}/metrics", headers={"x-api-key": "observer"}).text
        assert 'image_classifier_rejected_total{reason="rate-limited"} 6.0' in text


def test_without_keys_a_caller_is_an_address(model: Path, tmp_path: Path) -> None:
    options = ("--rate_limit", "0.001", "--trusted_proxies", "127.0.0.1")
    with serving(model, tmp_path / "log", *options) as server:
        answers = [
            httpx.post(f"{server.url}/predict", content=BODY, headers=PIXELS | {"x-forwarded-for": address}).status_code
            for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")
        ]
        assert answers == [200, 429, 200, 200, 429, 200]


@pytest.mark.parametrize("side", [40, 400])
def test_the_pixels_of_files_are_waited_for(model: Path, tmp_path: Path, side: int) -> None:
    """A small file takes the short way, a large one the other."""
    image = encode(draw_images(1)[0].repeat(side // 32 + 1, 0).repeat(side // 32 + 1, 1)[:side, :side], "JPEG")
    with serving(model, tmp_path / "log", "--pixel_rate_limit", "1") as server:
        assert ask(server, "", image, "image/jpeg").status_code == 200
        answer = ask(server)
        check_refusal(answer)
        assert side * side - 60 <= int(answer.headers["retry-after"]) <= side * side


def test_the_pixels_of_tensors_are_waited_for(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--pixel_rate_limit", "1") as server:
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": list(BODY)}
        address = f"{server.url}/v2/models/image_classifier/infer"
        assert [httpx.post(address, json={"inputs": [tensor]}).status_code for _ in range(2)] == [200, 429]


def test_requests_that_are_none_do_not_fill_the_log(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--log_lines_per_s", "0") as server:
        for _ in range(20):
            with server.connect() as connection:
                connection.sendall(b"no request\r\n\r\n")
                assert read_answer(connection).status == 400
        server.stop()
    log = server.log.read_text()
    assert "Invalid HTTP request" not in log and " 400 " not in log
    assert "serving image_classifier, version" in log
