"""The server and the registry: an alias is served, and when it moves the server follows without losing a request."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx

from tests.conftest import run_command
from tests.serving import PIXELS, Clients, draw_images, serving


def test_an_alias_that_moves_is_followed(published_run: Path, sample_dataset: Path, tmp_path: Path) -> None:
    options = ("--experiments_folder", tmp_path)

    def call(*words: str | Path) -> None:
        proof = ("--dataset_folder", sample_dataset)
        run_command("image_classifier", "registry", *words, *proof, *options, cwd=tmp_path)

    call("add", published_run.parent, "--name", "cifar")
    call("promote", "cifar/1")
    body = draw_images(1)[0].tobytes()
    with serving("models:/cifar@champion", tmp_path / "log", *options, "--reload_every_s", "0.5") as server:
        answer = httpx.post(f"{server.url}/predict", content=body, headers=PIXELS).json()
        assert answer["model_version"] == "1"
        assert httpx.get(f"{server.url}/v2/models/cifar").json()["versions"] == ["1"]
        clients = Clients(server, 4)
        call("add", published_run.parent, "--name", "cifar")
        call("promote", "cifar/2")
        deadline = time.monotonic() + 30
        while httpx.get(f"{server.url}/model").json()["version"] != "2":
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.1)
        clients.stop()
        assert clients.lost == [] and set(clients.answered) == {200}
        again = httpx.post(f"{server.url}/predict", content=body, headers=PIXELS).json()
        assert (again["model_version"], again["predictions"]) == ("2", answer["predictions"])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
