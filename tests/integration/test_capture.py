"""A server that keeps what it answers: every form of a request, through kills and places that fail, and replayed."""

from __future__ import annotations

import base64
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.capture import Load, judge_kill, kill_all
from image_classifier.capture.files import read_captures
from image_classifier.cli import replay
from image_classifier.serving.server import build_recorder
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics
from tests.conftest import PROJECT
from tests.documents import iterate_blocks
from tests.serving import PIXELS, Running, draw_images, encode, serving, write_model

DOCUMENT = PROJECT / "docs" / "capture.md"


@pytest.fixture(name="model", scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx", width=2)


class Kept(NamedTuple):
    """What is captured of an image."""

    pixels: bytes
    probabilities: list[float]
    caller: str | None


def read_kept(folder: Path) -> dict[tuple[str, int], Kept]:
    """Read all captured images by request and index; fail where a file is broken or an image comes twice."""
    captures = read_captures(folder)
    kept: dict[tuple[str, int], Kept] = {}
    for captured in captures:
        for row in range(len(captured)):
            key = captured.request_ids[row], int(captured.image_indices[row])
            assert key not in kept
            kept[key] = Kept(
                captured.pixels[row].tobytes(), captured.probabilities[row].tolist(), captured.callers[row]
            )
    assert not captures.broken
    return kept


def ask_in_every_form(server: Running, images: NDArray[np.uint8]) -> None:
    """Ask for images in every form of a request, each of which names itself."""
    files = [encode(image) for image in images]
    nested = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    binary = images.tobytes()
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def ask(path: str, name: str, **request: object) -> None:
            headers = {"x-request-id": name, **request.pop("headers", {})}  # type: ignore[dict-item]
            answer = client.post(path, headers=headers, **request)  # type: ignore[arg-type]
            assert answer.status_code == 200, answer.text

        ask("/predict", "one-pixels", content=images[0].tobytes(), headers=PIXELS)
        ask("/predict", "one-file", content=files[0], headers={"content-type": "image/png"})
        ask("/predict?request_id=query", "", content=files[0], headers={"content-type": "image/png"})
        ask("/predict", "pixels", content=binary, headers=PIXELS)
        ask("/predict", "form", files=[("image", file) for file in files])
        ask("/predict", "", json={"images": [base64.b64encode(file).decode() for file in files], "request_id": "json"})
        path = "/v2/models/image_classifier/infer"
        ask(path, "v2", json={"inputs": [nested | {"data": images.tolist()}]})
        ask(path, "", json={"id": "v2-named", "inputs": [nested | {"data": images.ravel().tolist()}]})
        head = httpx.Request(
            "POST", path, json={"inputs": [nested | {"parameters": {"binary_data_size": len(binary)}}]}
        )
        length = {"Inference-Header-Content-Length": str(len(head.content))}
        ask(path, "v2-binary", content=head.content + binary, headers=length)
        refused = client.post("/predict", content=b"no image", headers={"content-type": "image/png"})
        assert refused.status_code == 422


def test_every_form_of_a_request_is_captured_and_replayed_as_documented(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_images(3)
    folder = tmp_path / "captured"
    options = ("--capture", folder, "--capture_fraction", "1", "--capture_flush_s", "1000")
    with serving(model, tmp_path / "log", *options) as server:
        ask_in_every_form(server, images)
        assert server.read_metric("image_classifier_captured_images_total", result="failed") == 0
    kept = read_kept(folder)
    forms = {"one-pixels": 1, "one-file": 1, "query": 1}
    forms |= dict.fromkeys(("pixels", "form", "json", "v2", "v2-named", "v2-binary"), len(images))
    assert kept.keys() == {(name, index) for name, number in forms.items() for index in range(number)}
    assert all(each.pixels == images[index].tobytes() for (_, index), each in kept.items())
    assert all(each.probabilities == kept["pixels", index].probabilities for (_, index), each in kept.items())
    published = tmp_path / "experiments/cifar10/first/published"
    published.parent.mkdir(parents=True)
    shutil.copy(model, published)
    monkeypatch.chdir(tmp_path)
    read, computed = (block for block in iterate_blocks(DOCUMENT) if block.comment.startswith("executed by"))
    exec(read.code, {})
    assert "(21, 32, 32, 3) (21, 10)\n[]" in capsys.readouterr().out
    assert replay.main(shlex.split(computed.code)[2:]) == 0
    assert "IDENTICAL: every bit of the probabilities of 21 images of 1 files" in capsys.readouterr().out


def test_nothing_is_captured_unless_asked_for() -> None:
    assert build_recorder(ServerSettings(model="m"), 32, Metrics()) is None


@pytest.mark.alone
@pytest.mark.parametrize("life_s", [0.3, 2.6])
def test_a_kill_leaves_whole_files_and_loses_the_last_seconds_alone(tmp_path: Path, model: Path, life_s: float) -> None:
    """`benchmarks.capture` kills more servers."""
    flush_s = 2.0
    folder = tmp_path / "captured"
    options = ("--capture", folder, "--capture_fraction", "1", "--capture_flush_s", str(flush_s))
    with serving(model, tmp_path / "log", *options) as server:
        load = Load(server.port, draw_images(1)[0].tobytes(), num_clients=2)
        time.sleep(life_s)
        killed_at = time.monotonic()
        kill_all(server.process.pid)
        assert server.process.wait(20) == -signal.SIGKILL
        load.join()
    judged = judge_kill(folder, load.answered, killed_at)
    assert judged["answered"] > 10 and judged["lost"] > 0 and judged["broken"] == 0
    assert judged["loss_s"] <= flush_s
    assert bool(judged["files"]) == (life_s > flush_s)


def test_answers_go_on_where_nothing_can_be_captured(tmp_path: Path, model: Path) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.symlink_to(place)
    options = ("--capture", place, "--capture_fraction", "1", "--capture_flush_s", "0.1")
    with serving(model, log, *options) as server:
        for _ in range(2):
            ask_in_every_form(server, draw_images(2))
            time.sleep(0.2)
        assert server.read_metric("image_classifier_captured_images_total", result="failed") >= 15
        assert server.read_metric("image_classifier_captured_images_total", result="written") == 0
    assert log.read_text().count("capture failed, answering continues") == 1


def test_a_place_of_an_unknown_kind_is_refused_before_anything_is_served(model: Path) -> None:
    words = [sys.executable, "-m", "image_classifier", "serve", str(model), "--port", "0", "--capture", "nope://bucket"]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "nope://bucket cannot be reached: Protocol not known: nope" in result.stderr
