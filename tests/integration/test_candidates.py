"""Servers with a second model: a canary that answers some callers, through its failure, and a shadow."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from image_classifier.capture.files import read_captures
from tests.conftest import PROJECT
from tests.serving import PIXELS, Running, draw_images, serving, write_model

CALLERS = [f"caller-{number}" for number in range(12)]
IMAGE = draw_images(1)[0].tobytes()
assert 255 in IMAGE


@pytest.fixture(name="models", scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "champion.onnx"), write_model(folder / "challenger.onnx", seed=1)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(server: Running, caller: str = "", path: str = "/predict") -> str:
    """Ask for an image, and return the version that answered."""
    answer = httpx.post(f"{server.url}{path}", content=IMAGE, headers=PIXELS | {"x-api-key": caller}, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


def find_version(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()[:12]


def test_a_canary_answers_its_callers_until_it_fails(tmp_path: Path, models: tuple[Path, Path]) -> None:
    champion, challenger = models
    canary, keys, log = tmp_path / "canary.onnx", tmp_path / "keys", tmp_path / "log"
    canary.write_bytes(challenger.read_bytes())
    keys.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in CALLERS))
    versions = find_version(champion), find_version(challenger)
    options = ("--api_keys_file", keys, "--canary", canary, "--canary_fraction", "0.5", "--reload_every_s", "0.1")
    captured = ("--capture", tmp_path / "captured", "--capture_fraction", "1")
    with serving(champion, log, *options, *captured) as server:
        answered = {caller: {ask(server, caller) for _ in range(3)} for caller in CALLERS}
        assert all(len(each) == 1 for each in answered.values())
        assert set().union(*answered.values()) == set(versions)
        headers = {"x-api-key": CALLERS[0]}
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        for version in versions:
            number = 3 * sum(each == {version} for each in answered.values())
            assert f'image_classifier_version_images_total{{version="{version}"}} {number:.1f}\n' in metrics
        assert (
            f'image_classifier_candidate_info{{role="canary",run_name="seed-1",version="{versions[1]}"}} 1.0' in metrics
        )

        write_model(tmp_path / "broken.onnx", fails_on_white=True).rename(canary)
        wait_until(lambda: f"serving version {find_version(canary)}" in log.read_text())
        assert {ask(server, caller) for caller in CALLERS} == {versions[0]}
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        assert "image_classifier_canary_fallbacks_total 0.0" not in metrics
        assert log.read_text().count("the canary failed, the champion answers instead") == 1
        write_model(tmp_path / "other.onnx", classes=["a", "b"]).rename(canary)
        wait_until(lambda: "differ in classes, image size or fit" in log.read_text())
    kept = [
        (caller, version)
        for each in read_captures(tmp_path / "captured")
        for caller, version in zip(each.callers, each.model_versions, strict=True)
    ]
    assert len(kept) == 4 * len(CALLERS)
    assert {(caller, version) for caller, (version,) in answered.items()} <= set(kept)


def test_a_client_that_names_the_version_gets_it_and_no_canary(tmp_path: Path, models: tuple[Path, Path]) -> None:
    champion, challenger = models
    with serving(champion, tmp_path / "log", "--canary", challenger, "--canary_fraction", "1") as server:
        assert ask(server) == find_version(challenger)
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": list(IMAGE)}
        path = f"{server.url}/v2/models/image_classifier"
        answered = httpx.post(f"{path}/infer", json={"inputs": [tensor]}).json()
        named = httpx.post(f"{path}/versions/{find_version(champion)}/infer", json={"inputs": [tensor]}).json()
        versions = answered["model_version"], named["model_version"]
        assert versions == (find_version(challenger), find_version(champion))


def test_a_shadow_computes_and_answers_nobody(tmp_path: Path, models: tuple[Path, Path]) -> None:
    champion, challenger = models
    with serving(champion, tmp_path / "log", "--shadow", challenger) as server:
        assert {ask(server) for _ in range(5)} == {find_version(champion)}

        def count(**labels: str) -> float:
            return server.read_metric("image_classifier_shadow_images_total", **labels)

        wait_until(lambda: count() == 5)
        assert count(result="same_class") + count(result="other_class") == 5
        assert server.read_metric("image_classifier_shadow_difference_count") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--canary", "nowhere.onnx"), "there is no published model"),
        (("--shadow", "OTHER"), "differ in classes, image size or fit"),
    ],
)
def test_a_second_model_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, models: tuple[Path, Path], options: tuple[str, str], message: str
) -> None:
    other = write_model(tmp_path / "other.onnx", classes=["a", "b"])
    words = [sys.executable, "-m", "image_classifier", "serve", str(models[0]), "--port", "0"]
    words += [str(other) if word == "OTHER" else word for word in options]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
