"""The server as a process: what it answers, what it refuses, how it is stopped, and what it says of itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from image_classifier.published.predictor import load_predictor
from tests.bombs import build_even_png, save
from tests.conftest import PROJECT, find_port, run_program
from tests.serving import (
    CLASSES,
    PIXELS,
    Clients,
    Running,
    build_animation,
    build_png_of,
    build_request,
    build_zip,
    draw_images,
    encode,
    read_answer,
    serving,
    wait_until_ready,
    write_model,
)

PROBLEM = "application/problem+json"
NOISE = draw_images(1)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes in no time."""
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes about a hundredth of a second for an image."""
    return write_model(tmp_path_factory.mktemp("model") / "slow.onnx", width=512)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with limits that tests reach."""
    options = ("--header_timeout_s", "1", "--body_timeout_s", "1", "--max_images", "8", "--max_body_bytes", "1000000")
    with serving(model, tmp_path_factory.mktemp("log") / "log", *options, "--max_pixels", "4000000") as running:
        yield running
        assert running.process.poll() is None, running.log.read_text()


def test_an_image_gets_the_classes_that_the_model_gives(server: Running, model: Path) -> None:
    expected = load_predictor(model).predict(NOISE[None])[0]
    answer = httpx.post(f"{server.url}/predict?top_k=10&request_id=mine", content=NOISE.tobytes(), headers=PIXELS)
    assert answer.status_code == 200
    document = answer.json()
    (prediction,) = document["predictions"]
    assert prediction["class"] == CLASSES[expected.argmax()]
    assert prediction["probability"] == pytest.approx(expected.max(), abs=1e-6)
    shares = {score["class"]: score["probability"] for score in prediction["top_k"]}
    assert [shares[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-6)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert (document["request_id"], document["api_version"]) == ("mine", "1")
    assert document["model_version"] == load_predictor(model).model.version


def test_each_way_in_gives_the_same_answer(server: Running) -> None:
    png = encode(NOISE)
    webp = encode(NOISE, "WEBP", lossless=True)
    with httpx.Client(base_url=server.url) as client:
        answers = [
            client.post("/predict", content=NOISE.tobytes(), headers=PIXELS),
            client.post("/predict", content=png, headers={"content-type": "image/png"}),
            client.post("/predict", content=webp, headers={"content-type": "image/webp"}),
            client.post("/predict", files={"image": ("a.png", png, "image/png")}),
            client.post("/predict", json={"images": [base64.b64encode(png).decode()], "request_id": "x"}),
        ]
    assert [answer.status_code for answer in answers] == [200] * 5
    first = answers[0].json()["predictions"]
    assert all(answer.json()["predictions"] == first for answer in answers)
    assert answers[4].json()["request_id"] == "x"


def test_many_images_are_answered_in_their_order(server: Running, model: Path) -> None:
    images = draw_images(8, seed=1)
    expected = [CLASSES[best] for best in load_predictor(model).predict(images).argmax(axis=1)]
    files = [("image", (f"{number}.png", encode(image), "image/png")) for number, image in enumerate(images)]
    texts = [base64.b64encode(encode(image)).decode() for image in images]
    for answer in (
        httpx.post(f"{server.url}/predict", content=images.tobytes(), headers=PIXELS),
        httpx.post(f"{server.url}/predict", files=files, data={"top_k": "1"}),
        httpx.post(f"{server.url}/predict", json={"images": texts, "top_k": 1}),
    ):
        assert [prediction["class"] for prediction in answer.json()["predictions"]] == expected


def test_the_pixels_that_the_network_saw_come_back(server: Running) -> None:
    answer = httpx.post(
        f"{server.url}/predict?show_input=true", content=encode(NOISE), headers={"content-type": "image/png"}
    )
    assert base64.b64decode(answer.json()["predictions"][0]["input"]) == NOISE.tobytes()


HOSTILE: dict[str, tuple[bytes, str, int]] = {
    "empty octets": (b"", "application/octet-stream", 400),
    "empty image": (b"", "image/png", 400),
    "one byte less": (bytes(3071), "application/octet-stream", 400),
    "one byte more": (bytes(3073), "application/octet-stream", 400),
    "an image as octets": (encode(NOISE), "application/octet-stream", 400),
    "truncated PNG": (encode(NOISE)[:1000], "image/png", 422),
    "truncated JPEG": (encode(NOISE, "JPEG")[:500], "image/jpeg", 422),
    "JPEG that says PNG": (encode(NOISE, "JPEG"), "image/png", 422),
    "huge": (build_png_of(40_000, 40_000), "image/png", 422),
    "over the limit of pixels": (build_png_of(2001, 2000), "image/png", 422),
    "animated PNG": (build_animation("PNG"), "image/png", 422),
    "animated WebP": (build_animation("WEBP"), "image/webp", 422),
    "GIF": (encode(NOISE, "GIF"), "image/gif", 415),
    "GIF that says PNG": (encode(NOISE, "GIF"), "image/png", 422),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 415),
    "SVG that says PNG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/png", 422),
    "zip": (build_zip(), "application/zip", 415),
    "zip that says JPEG": (build_zip(), "image/jpeg", 422),
    "no type": (bytes(3072), "", 415),
    "nonsense type": (bytes(3072), "\xe9/;;;=", 415),
    "too many images": (bytes(3072 * 9), "application/octet-stream", 413),
    "too large": (bytes(1_000_001), "application/octet-stream", 413),
    "empty JSON": (b"", "application/json", 400),
    "not UTF-8": (b'{"images": ["\xff\xfe"]}', "application/json", 400),
    "nested ten thousand deep": (b"[" * 10_000, "application/json", 400),
    "objects nested ten thousand deep": (b'{"a":' * 10_000, "application/json", 400),
    "NaN": (b'{"images": [NaN]}', "application/json", 400),
    "top_k NaN": (b'{"images": ["aGk="], "top_k": NaN}', "application/json", 400),
    "a number of many digits": (b'{"images": ["aGk="], "top_k": ' + b"9" * 100_000 + b"}", "application/json", 400),
    "a million items": (b'{"images": [' + b"0," * 400_000 + b"0]}", "application/json", 413),
    "no list": (b'{"images": "aGk="}', "application/json", 400),
    "a list": (b"[]", "application/json", 400),
    "no images": (b'{"images": []}', "application/json", 400),
    "no base64": (b'{"images": ["\xc3\xa9"]}', "application/json", 400),
    "base64 of nothing": (b'{"images": [""]}', "application/json", 400),
    "base64 of no image": (b'{"images": ["aGk="]}', "application/json", 422),
    "null": (b'{"images": [null]}', "application/json", 400),
    "unknown field": (b'{"images": ["aGk="], "topk": 3}', "application/json", 400),
    "top_k of nothing": (b'{"images": ["aGk="], "top_k": 0}', "application/json", 400),
    "top_k true": (b'{"images": ["aGk="], "top_k": true}', "application/json", 400),
    "top_k above the classes": (b'{"images": ["aGk="], "top_k": 11}', "application/json", 400),
    "request_id with a line feed": (b'{"images": ["aGk="], "request_id": "a\\nb"}', "application/json", 400),
    "request_id too long": (b'{"images": ["aGk="], "request_id": "' + b"a" * 129 + b'"}', "application/json", 400),
    "show_input 1": (b'{"images": ["aGk="], "show_input": 1}', "application/json", 400),
    "multipart without boundary": (b"--x\r\n", "multipart/form-data", 400),
    "multipart that ends early": (
        b'--x\r\ncontent-disposition: form-data; name="a"',
        "multipart/form-data; boundary=x",
        400,
    ),
    "multipart without files": (
        b'--x\r\ncontent-disposition: form-data; name="top_k"\r\n\r\n1\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        400,
    ),
    "multipart with nonsense": (b"\x00" * 5000, "multipart/form-data; boundary=x", 400),
    "multipart with an empty file": (
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        400,
    ),
}


@pytest.mark.parametrize(("body", "content_type", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_rubbish_is_a_problem_and_never_an_error(server: Running, body: bytes, content_type: str, status: int) -> None:
    answer = httpx.post(
        f"{server.url}/predict", content=body, headers={b"content-type": content_type.encode("latin-1")}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    document = answer.json()
    assert document["status"] == status and document["type"].startswith("urn:image-classifier:problem:")
    assert document["detail"].isprintable() and document["request_id"]


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "RGBA", "P", "1", "I;16"])
def test_images_of_all_kinds_are_read(server: Running, mode: str) -> None:
    image = (
        Image.fromarray(NOISE[:, :, 0].astype(np.uint16) << 8)
        if mode == "I;16"
        else Image.fromarray(NOISE).convert(mode)
    )
    kind = "JPEG" if mode == "CMYK" else "PNG"
    buffer = io.BytesIO()
    image.save(buffer, kind)
    answer = httpx.post(
        f"{server.url}/predict", content=buffer.getvalue(), headers={"content-type": f"image/{kind.lower()}"}
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("top_k=10", 200),
        ("top_k=11", 400),
        ("top_k=-1", 400),
        ("top_k=1&top_k=2", 400),
        ("colour=1", 400),
        ("%ff", 400),
    ],
)
def test_options_in_the_query_are_checked(server: Running, query: str, status: int) -> None:
    answer = httpx.post(f"{server.url}/predict?{query}", content=NOISE.tobytes(), headers=PIXELS)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("PUT", "/", 405), ("GET", "/nowhere", 404), ("GET", "/../etc/passwd", 404)],
)
def test_other_paths_and_methods_are_problems(server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{server.url}{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert status != 405 or answer.headers["allow"]


RAW = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "negative length": (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
    "two lengths": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        400,
    ),
    "length and chunks": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        400,
    ),
    "bad chunk": (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
    "endless head": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000, 431),
    "endless line": (b"GET /" + b"a" * 100_000, 431),
    "length of many digits": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999\r\n\r\n",
        413,
    ),
    "chunks above the limit": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"10000\r\n"
        + bytes(65536)
        + b"\r\n"
        + b"f0000\r\n"
        + bytes(0xF0000)
        + b"\r\n0\r\n\r\n",
        413,
    ),
}


@pytest.mark.parametrize(("content", "status"), RAW.values(), ids=RAW.keys())
def test_what_no_client_would_send_is_a_problem(server: Running, content: bytes, status: int) -> None:
    with server.connect() as connection:
        try:
            connection.sendall(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was all sent
        answered, body, _ = read_answer(connection)
    assert answered == status
    assert json.loads(body)["status"] == status


@pytest.mark.alone
@pytest.mark.parametrize(
    "beginning",
    [
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\n",
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3072\r\n\r\nabc",
    ],
    ids=["head", "body"],
)
def test_who_sends_slowly_is_cut_off(server: Running, beginning: bytes) -> None:
    with server.connect() as connection:
        began = time.monotonic()
        connection.sendall(beginning)
        connection.settimeout(0.1)
        status = None
        while time.monotonic() - began < 10:
            try:
                connection.sendall(b"a" if b"\r\n\r\n" in beginning else b"x-a: b\r\n")  # a drop now and then
                status = read_answer(connection).status
                break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
    assert status in (408, None)
    assert 0.9 < time.monotonic() - began < 4


@pytest.mark.alone
def test_who_begins_another_head_during_an_answer_is_cut_off(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(build_request(NOISE.tobytes()) + b"PO")
        assert read_answer(connection).status == 200
        connection.sendall(b"S")
        began = time.monotonic()
        assert read_answer(connection).status in (408, 0)
        assert time.monotonic() - began < 4


def test_a_client_that_sends_all_before_it_reads_hears_that_it_is_too_much(server: Running) -> None:
    request = urllib.request.Request(f"{server.url}/predict", bytes(50_000_000), {"Content-Type": "image/png"})
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(request, timeout=60):
        pass
    assert caught.value.code == 413 and json.loads(caught.value.read())["status"] == 413


def test_a_compressed_body_is_refused_though_it_has_the_length_of_an_image(server: Running) -> None:
    headers = {**PIXELS, "content-encoding": "gzip"}
    assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=headers).status_code == 415


def test_who_says_nothing_is_cut_off(server: Running) -> None:
    with server.connect() as connection:
        assert read_answer(connection) == (0, b"", True)


def test_requests_in_one_packet_are_answered_in_turn(server: Running) -> None:
    images = draw_images(5, seed=3)
    with server.connect() as connection:
        connection.sendall(b"".join(build_request(image.tobytes()) for image in images))
        content = b""
        while content.count(b'"api_version"') < 5:
            part = connection.recv(65536)
            assert part, content
            content += part
    classes = re.findall(rb'"predictions":\[\{"class":"(\w+)"', content)
    expected = [
        httpx.post(f"{server.url}/predict", content=image.tobytes(), headers=PIXELS).json()["predictions"][0]["class"]
        for image in images
    ]
    assert [name.decode() for name in classes] == expected


def test_memory_comes_back_after_hostile_images(server: Running) -> None:
    bodies = [(body, kind) for body, kind, _ in HOSTILE.values()] + [(build_png_of(2000, 2000), "image/png")]

    def send_all(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            for body, kind in bodies:
                answer = client.post(
                    f"{server.url}/predict", content=body, headers={b"content-type": kind.encode("latin-1")}
                )
                assert answer.status_code < 500 or answer.status_code == 503

    def send_round() -> float:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send_all, range(4)))
        return server.measure_memory()

    before = send_round()
    after = [send_round() for _ in range(3)]
    assert after[-1] < before + 30, (before, after)


def send_photos(server: Running, headers: dict[str, str], end: threading.Event) -> list[int]:
    """Send ordinary photos, one after the other, until the end; return the statuses of the answers."""
    photo, screenshot = Image.new("RGB", (4000, 3000), "teal"), Image.new("RGB", (1920, 1080), "teal")
    bodies = [(save(photo, "JPEG"), "image/jpeg"), (save(screenshot), "image/png"), (encode(NOISE), "image/png")]
    statuses: list[int] = []
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        while not end.is_set() or not statuses:
            for body, kind in bodies:
                statuses.append(client.post("/predict", content=body, headers={"content-type": kind}).status_code)
    return statuses


@pytest.mark.parametrize("max_pixels", [None, 25_000_000])
def test_large_images_of_one_caller_hold_up_no_ordinary_photos(
    max_pixels: int | None, model: Path, tmp_path: Path
) -> None:
    """Neither another caller's nor his own, and memory stays within what decoding may take."""
    side = 3535 if max_pixels is None else 5000
    hostile = [build_even_png(16, colour, side=side) for colour in (0, 6)]
    keys = {name: f"{name}'s key" for name in ("mallory", "alice")}
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in keys.items()]
    (tmp_path / "keys").write_text("\n".join(lines))
    mallory, alice = ({"authorization": f"Bearer {key}"} for key in keys.values())
    options = ["--api_keys_file", tmp_path / "keys", *([] if max_pixels is None else ["--max_pixels", max_pixels])]
    with serving(model, tmp_path / "log", *map(str, options)) as server:

        def send(number: int) -> int:
            kind = {"content-type": "image/png"}
            answer = httpx.post(
                f"{server.url}/predict", content=hostile[number % 2], headers=mallory | kind, timeout=60
            )
            return answer.status_code

        over = build_even_png(16, 0, side=5100)
        refused = httpx.post(f"{server.url}/predict", content=over, headers=mallory | {"content-type": "image/png"})
        assert refused.status_code == 422 and "5100 x 5100 pixels, but at most" in refused.json()["detail"]
        before, end = server.measure_peak(), threading.Event()
        with ThreadPoolExecutor(10) as pool:
            photos = [pool.submit(send_photos, server, headers, end) for headers in (mallory, alice)]
            statuses = list(pool.map(send, range(24 if max_pixels is None else 8)))
            end.set()
            assert all({*future.result()} == {200} for future in photos)
        assert 200 in statuses and {*statuses} <= {200, 503}
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        assert server.measure_peak() < before + 200


def test_health_model_and_metrics(server: Running) -> None:
    assert httpx.get(f"{server.url}/health/live").json() == {"status": "live"}
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ready"}
    document = httpx.get(f"{server.url}/model").json()
    assert document["classes"] == list(CLASSES) and document["run_name"] == "seed-0"
    before = server.read_metric("image_classifier_predictions_total")
    httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS)
    assert server.read_metric("image_classifier_predictions_total") == before + 1
    assert server.read_metric("image_classifier_model_info", run_name="seed-0") == 1


def test_the_log_has_lines_and_no_images(server: Running) -> None:
    log = server.log.read_text()
    assert re.search(r"INFO POST /predict 200 \d+\.\d ms", log)
    assert "Traceback" not in log
    assert max(len(line) for line in log.splitlines()) < 1000


def test_the_machine_readable_log_is_in_the_common_schema(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--log_format", "ecs", "--log_lines_per_s", "2") as server:
        with httpx.Client() as client:
            trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            for _ in range(20):
                client.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS | trace)
            time.sleep(1.1)
            client.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS | trace)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    requests = [line for line in lines if line["log.logger" if "log.logger" in line else "log"] and "url" in line]
    assert 3 <= len(requests) <= 8  # of 21
    last = requests[-1]
    assert last["http"]["response"]["status_code"] == 200 and last["http"]["request"]["method"] == "POST"
    assert last["trace"]["id"] == "0af7651916cd43dd8448eb211c80319c"
    assert int(last["labels"]["lines_left_out"]) >= 13
    assert last["ecs.version"] and last["@timestamp"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(slow_model: Path, tmp_path: Path) -> None:
    with serving(slow_model, tmp_path / "log", "--max_queue", "8", "--max_images", "8", "--max_batch", "4") as server:
        with ThreadPoolExecutor(32) as pool:
            answers = list(
                pool.map(
                    lambda image: httpx.post(
                        f"{server.url}/predict", content=image.tobytes(), headers=PIXELS, timeout=60
                    ),
                    draw_images(64),
                )
            )
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and len(refused) < 64
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert server.read_metric("image_classifier_rejected_total", reason="queue-full") == len(refused)
        answer = httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS, timeout=60)
        assert answer.status_code == 200
        assert server.read_metric("image_classifier_batch_size_bucket", le="4.0") == server.read_metric(
            "image_classifier_batch_size_count"
        )


@pytest.mark.alone
def test_what_comes_too_late_is_given_up(slow_model: Path, tmp_path: Path) -> None:
    with serving(slow_model, tmp_path / "log", "--timeout_s", "0.03", "--max_batch", "4") as server:
        body = draw_images(64).tobytes()  # for which a tenth of the time that they take is left
        answer = httpx.post(f"{server.url}/predict", content=body, headers=PIXELS, timeout=60)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert server.read_metric("image_classifier_rejected_total", reason="deadline") >= 1
        while server.read_metric("image_classifier_pending_images"):
            time.sleep(0.05)
        assert server.read_metric("image_classifier_batch_size_sum") < 32


def test_a_client_that_left_costs_nothing_more(slow_model: Path, tmp_path: Path) -> None:
    with serving(slow_model, tmp_path / "log", "--max_batch", "2", "--timeout_s", "60") as server:
        for image in draw_images(40):
            with server.connect() as connection:
                connection.sendall(build_request(image.tobytes()))
        answer = httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS, timeout=60)
        assert answer.status_code == 200
        computed = server.read_metric("image_classifier_batch_size_sum")
        assert computed < 20
        assert server.read_metric("image_classifier_rejected_total", reason="client_left") + computed == 41
        assert server.read_metric("image_classifier_pending_images") == 0


def test_sigterm_loses_nothing_that_was_accepted(slow_model: Path, tmp_path: Path) -> None:
    options = ("--drain_s", "2", "--max_batch", "2", "--timeout_s", "60")
    with serving(slow_model, tmp_path / "log", *options) as server:
        clients = Clients(server, 12)
        while len(clients.answered) <= 5:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with server.connect() as connection:  # still served, but said to be not ready
            connection.sendall(b"GET /health/ready HTTP/1.1\r\nhost: localhost\r\n\r\n")
            status, body, _ = read_answer(connection)
            assert (status, json.loads(body)["detail"]) == (503, "the server is stopping")
        assert server.process.wait(30) == 0
        clients.join()
    assert clients.lost == []
    assert set(clients.answered) == {200}


def test_sigterm_answers_all_that_clients_ask_who_ask_all_the_time(model: Path, tmp_path: Path) -> None:
    """Of a quick network every client opens its next connection at once: some of them while the socket is closed."""
    with serving(model, tmp_path / "log", "--drain_s", "0.5") as server:
        clients = Clients(server, 8)
        time.sleep(0.5)
        assert server.stop() == 0
        clients.join()
    assert len(clients.lost) <= 8, clients.lost  # a connection that the kernel made while the socket was closed
    assert set(clients.answered) == {200}


def test_out_of_file_descriptors_it_goes_on(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log") as server, ExitStack() as connections:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (60, 60))
        for _ in range(80):  # which the kernel makes, and the process cannot have
            connections.enter_context(server.connect())
            time.sleep(0.02)
        connections.close()
        assert httpx.get(f"{server.url}/health/live", timeout=30).status_code == 200


def test_a_body_may_be_limited_to_less_than_an_image_is(model: Path, tmp_path: Path) -> None:
    bodies = (
        (NOISE.tobytes(), "application/octet-stream"),
        (encode(NOISE), "image/png"),
        (encode(NOISE * 0), "image/png"),
    )
    with serving(model, tmp_path / "log", "--max_body_bytes", "1000") as server:
        answers = [
            httpx.post(f"{server.url}/predict", content=content, headers={"content-type": kind})
            for content, kind in bodies
        ]
    assert [answer.status_code for answer in answers] == [413, 413, 200]


def test_a_dead_inference_thread_ends_the_process(tmp_path: Path) -> None:
    """A network that has no entry for the value 255 fails when that comes, as one does that meets a broken library."""
    table = numpy_helper.from_array(np.eye(255, 10, dtype=np.float32), "table")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("ReduceMax", ["whole", "axis"], ["most"], keepdims=0),
        helper.make_node("Cast", ["flat"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "most"], ["probabilities"]),
    ]
    nodes[1], nodes[2] = nodes[2], nodes[1]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        [table, numpy_helper.from_array(np.array([1]), "axis")],
    )
    good = onnx.load(write_model(tmp_path / "model.onnx"))
    broken = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    broken.metadata_props.extend(good.metadata_props)
    (tmp_path / "model.onnx").write_bytes(broken.SerializeToString())
    with serving(tmp_path / "model.onnx", tmp_path / "log") as server:
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 200
        answer = httpx.post(f"{server.url}/predict", content=b"\xff" * 3072, headers=PIXELS)
        assert answer.status_code == 503
        assert server.process.wait(30) == 1
        assert "inference failed, the server stops" in server.log.read_text()


def test_a_new_version_takes_over_without_losing_a_request(tmp_path: Path) -> None:
    first, second = (write_model(tmp_path / f"{seed}.onnx", seed=seed) for seed in (0, 1))
    versions = [load_predictor(path).model.version for path in (first, second)]
    link = tmp_path / "current.onnx"
    link.symlink_to(first)
    with serving(link, tmp_path / "log") as server:
        clients = Clients(server, 4)
        time.sleep(0.3)
        (tmp_path / "next").symlink_to(second)
        os.replace(tmp_path / "next", link)
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.url}/model").json()["version"] != versions[1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS).json()
        assert answer["model_version"] == versions[1]
        assert server.read_metric("image_classifier_model_info", version=versions[0]) == 0
        assert server.read_metric("image_classifier_model_info", version=versions[1]) == 1
        expected = load_predictor(second).predict(NOISE[None])[0]
        assert answer["predictions"][0]["class"] == CLASSES[expected.argmax()]
        clients.stop()
        assert clients.lost == [] and set(clients.answered) == {200}

        link.unlink()
        link.write_bytes(b"no model")
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while server.read_metric("image_classifier_reloads_total", result="failed") < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{server.url}/model").json()["version"] == versions[1]


def test_a_new_version_of_another_size_is_not_taken(tmp_path: Path) -> None:
    link = tmp_path / "current.onnx"
    link.symlink_to(write_model(tmp_path / "first.onnx"))
    with serving(link, tmp_path / "log") as server:
        before = httpx.get(f"{server.url}/model").json()
        (tmp_path / "next").symlink_to(write_model(tmp_path / "second.onnx", side=64))
        os.replace(tmp_path / "next", link)
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while server.read_metric("image_classifier_reloads_total", result="failed") < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{server.url}/model").json() == before
        assert httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS).status_code == 200
        assert "takes images of 64 x 64 pixels instead of 32 x 32; restart the server" in server.log.read_text()


def test_images_that_come_again_are_answered_from_the_cache(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--cache_size", "2") as server:
        images = draw_images(3)
        for image in (images[0], images[0], images[1], images[2], images[0]):
            assert httpx.post(f"{server.url}/predict", content=image.tobytes(), headers=PIXELS).status_code == 200
        assert server.read_metric("image_classifier_cache_lookups_total", result="hit") == 1
        assert server.read_metric("image_classifier_batch_size_sum") == 4
        assert server.read_metric("image_classifier_predictions_total") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere.onnx",), "nowhere.onnx"),
        (("MODEL", "--host", "0.0.0.0"), "--no_auth"),
        (("MODEL", "--max_batch", "0"), "--max_batch takes"),
        (("MODEL", "--jwt_issuer", "me"), "needed together"),
        (("MODEL", "--api_keys_file", "nowhere"), "--api_keys_file"),
        (("MODEL", "--port", "70000"), "--port takes"),
        (("MODEL", "--port", "BUSY"), "choose another address"),
        ((), "MODEL is missing"),
    ],
)
def test_what_cannot_be_served_is_one_line(model: Path, options: tuple[str, ...], message: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        words = [{"MODEL": str(model), "BUSY": str(busy.getsockname()[1])}.get(word, word) for word in options]
        if "--port" not in words:
            words += ["--port", str(find_port())]
        command = [sys.executable, "-m", "image_classifier", "serve", *words]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_published_folder_is_checked_before_it_is_served(published_run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(published_run, tmp_path / "published")
    with open(changed / "model.onnx", "r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    command = [sys.executable, "-m", "image_classifier", "serve", str(changed), "--port", str(find_port())]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "model.onnx" in result.stderr


def test_settings_come_from_the_environment_and_a_file(model: Path, tmp_path: Path) -> None:
    port = find_port()
    (tmp_path / ".env").write_text(f"IMAGE_CLASSIFIER_MODEL={model}\nIMAGE_CLASSIFIER_PORT=1\n")
    environment = os.environ | {"IMAGE_CLASSIFIER_PORT": str(port), "PYTHONPATH": str(PROJECT)}
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-m", "image_classifier", "serve", "--root_path", "/classifier"]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log)
    server = Running(process, f"http://127.0.0.1:{port}", port, tmp_path / "log")
    try:
        wait_until_ready(server)
        answer = httpx.post(f"{server.url}/predict", content=NOISE.tobytes(), headers=PIXELS)
        assert answer.status_code == 200
        assert 'href="page/style.css"' in httpx.get(f"{server.url}/").text
        assert f"at {server.url}/, behind a proxy at /classifier/ (startup" in server.log.read_text()
    finally:
        assert server.stop() == 0


def test_neither_torch_nor_what_only_tokens_need_is_imported(model: Path) -> None:
    modules = ", ".join(f"image_classifier.serving.{name}" for name in ("app", "protocol", "server", "tracing"))
    script = f"import sys, {modules}, image_classifier.cli.serve"
    script += "; assert not {'torch', 'jwt', 'cryptography'} & sys.modules.keys()"
    run_program(sys.executable, "-W", "error", "-c", script, cwd=PROJECT)


def test_a_missing_extra_is_one_line(installed_environment: Path, tmp_path: Path) -> None:
    command = [str(installed_environment / "bin" / "image_classifier"), "serve", "model.onnx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "pip install 'image-classifier[serve]'" in result.stderr
