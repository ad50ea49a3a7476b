"""The client against a running server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_classifier.client import AsyncClient, Client, Predictions
from image_classifier.errors import ServerError
from image_classifier.published.predictor import load_predictor
from tests.conftest import PROJECT
from tests.serving import CLASSES, Running, draw_images, encode, serving, write_model

KEY = "alices-key"
EXAMPLE = PROJECT / "docs" / "example.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a key, and has two requests a second for each caller."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    options = ("--api_keys_file", folder / "keys", "--rate_limit", "2")
    with serving(model, folder / "log", *options) as running:
        yield running


def test_each_way_in_gives_what_the_model_gives(server: Running, model: Path) -> None:
    images = draw_images(3)
    expected = [CLASSES[best] for best in load_predictor(model).predict(images).argmax(axis=1)]
    files = [encode(image, kind) for image, kind in zip(images, ("PNG", "BMP", "PNG"), strict=True)]
    with Client(server.url, key=KEY) as client:
        assert client.is_ready()
        described = client.describe_model()
        assert (described.classes, described.image_size) == (CLASSES, 32)
        for answer in (client.predict(*files), client.predict_pixels(images), client.predict_pixels(images.tobytes())):
            assert [each.label for each in answer.predictions] == expected
            assert answer.model_version == described.version
        named = client.predict(EXAMPLE, top_k=2, request_id="mine")
        assert named.request_id == "mine" and len(named.predictions[0].top_k) == 2
        assert named.predictions[0].top_k[0].label == named.predictions[0].label


def test_the_asynchronous_client_gives_the_same(server: Running) -> None:
    images = draw_images(2, seed=1)

    async def ask() -> tuple[bool, Predictions, Predictions]:
        async with AsyncClient(server.url, key=KEY) as client:
            assert (await client.describe_model()).classes == CLASSES
            files, pixels = await asyncio.gather(
                client.predict(*map(encode, images), request_id="1"), client.predict_pixels(images, request_id="1")
            )
            return await client.is_ready(), files, pixels

    is_ready, files, pixels = asyncio.run(ask())
    assert is_ready and files == pixels


def test_a_caller_over_its_limit_is_answered_after_the_time_that_the_server_names(server: Running) -> None:
    began = time.monotonic()
    with Client(server.url, key=KEY, num_retries=5) as client:
        for _ in range(5):
            client.predict(EXAMPLE)
    assert time.monotonic() - began >= 1
    with Client(server.url, key=KEY, num_retries=0) as client:
        with pytest.raises(ServerError) as caught:
            for _ in range(5):
                client.predict(EXAMPLE)
    assert (caught.value.status, caught.value.kind) == (429, "rate-limited")


def test_refusals_say_what_to_do(server: Running) -> None:
    with Client(server.url) as client, pytest.raises(ServerError) as caught:
        client.predict(EXAMPLE)
    assert (caught.value.status, caught.value.kind) == (401, "unauthorized")
    with Client(server.url, key=KEY) as client, pytest.raises(ServerError, match="3,072 bytes"):
        client.predict_pixels(bytes(10))
    assert KEY not in server.log.read_text()


def test_a_server_that_is_gone_is_not_ready(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log") as server:
        with Client(server.url) as client:
            assert client.is_ready()
            server.stop()
            assert not client.is_ready()
