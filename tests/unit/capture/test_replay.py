"""Captured images are computed again, each in a batch of its size, and every bit counts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier.capture.files import (
    CaptureFacts,
    read_captures,
)
from image_classifier.capture.places import LocalPlace
from image_classifier.capture.recorder import describe_machine
from image_classifier.capture.replay import compute_again, replay
from image_classifier.cli import replay as command
from image_classifier.errors import DataError
from image_classifier.published.predictor import Predictor, load_predictor
from tests.captures import CapturedImage, build_capture
from tests.serving import CLASSES, draw_images, write_model

SIZES = (1, 1, 3, 3, 3, 3, 2)


@pytest.fixture(name="model", scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx", width=4)


@pytest.fixture(name="predictor", scope="module")
def load(model: Path) -> Predictor:
    return load_predictor(model, num_threads=1)


def capture(folder: Path, predictor: Predictor, start: int = 0, changes: float = 0, **facts: Any) -> str:
    """Write a file of what a model answers, with a change of one probability."""
    images = draw_images(len(SIZES))
    rows = predictor.predict(images)
    rows[2, 0] += changes
    model = predictor.model
    all_facts = CaptureFacts(32, CLASSES, **{"model_digest": model.digest, "machine": describe_machine()} | facts)
    captured = [
        CapturedImage(start + number, f"request-{number}", 0, None, model.version, size, image.tobytes(), row.tolist())
        for number, (size, image, row) in enumerate(zip(SIZES, images, rows, strict=True))
    ]
    path, content = build_capture(all_facts, captured)
    LocalPlace(folder).write(path, content)
    return path


def test_the_same_answers_are_identical(
    tmp_path: Path, model: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    for start in (0, 10):
        capture(tmp_path, predictor, start)
    assert command.main([str(tmp_path), str(model)]) == 0
    shown = capsys.readouterr()
    assert shown.out == (
        "IDENTICAL: every bit of the probabilities of 14 images of 2 files, " f"version {predictor.model.version}\n"
    )
    assert command.main([str(tmp_path), str(model), "--until", "1970-01-01T00:00:00.000005"]) == 0
    assert "of 5 images of 1 files" in capsys.readouterr().out


def test_one_bit_is_different(
    tmp_path: Path, model: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    row = predictor.predict(draw_images(3)[2:])[0, 0]
    path = capture(tmp_path, predictor, changes=float(np.nextafter(row, np.float32(1)) - row), machine="another one")
    assert command.main([str(tmp_path), str(model)]) == 3
    shown = capsys.readouterr()
    assert f"DIFFERENT: 1 of 7 images of 1 files, version {predictor.model.version}; 0 got another class" in shown.out
    assert f"the first is image 0 of request request-2 in {path}" in shown.out
    assert "computed there by another one; here by ONNX Runtime" in shown.err


def test_other_versions_are_named_and_broken_files_left_out(
    tmp_path: Path, model: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(tmp_path, predictor)
    capture(tmp_path, predictor, 10, model_digest="abc" * 20)
    assert command.main([str(tmp_path), str(model)]) == 0
    named = f"{predictor.model.version} (sha256 abcabcabcabc)"
    assert f"note: 7 images of version {named} were not compared" in capsys.readouterr().err
    broken = capture(tmp_path, predictor, 20)
    (tmp_path / broken).write_bytes(b"PAR1")
    assert command.main([str(tmp_path), str(model)]) == 5
    assert "7 images of 1 files" in capsys.readouterr().out
    other = write_model(tmp_path / "other.onnx", seed=1)
    assert command.main([str(tmp_path), str(other)]) == 2
    versions = rf"of version {predictor.model.version}, {re.escape(named)}; name the model"
    assert re.search(versions, capsys.readouterr().err)
    with pytest.raises(DataError, match="all files are broken"):
        folder = tmp_path / "broken"
        (folder / broken).parent.mkdir(parents=True)
        (folder / broken).write_bytes(b"")
        replay(read_captures(folder), predictor)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "MODEL"], "nowhere cannot be read"),
        (["CAPTURE", "nowhere.onnx"], "there is no published model nowhere.onnx"),
        (["CAPTURE", "MODEL", "--since", "tomorrow"], "--since takes a time such as"),
        (["CAPTURE", "MODEL", "--since", "0001-01-01T00:00+23:00"], "--since takes a time such as"),
        (["CAPTURE", "MODEL", "--since", "2026-01-01"], "has no captures in this period"),
    ],
)
def test_bad_input_is_explained(
    tmp_path: Path,
    model: Path,
    predictor: Predictor,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    capture(tmp_path, predictor)
    given = {"CAPTURE": str(tmp_path), "MODEL": str(model)}
    assert command.main([given.get(word, word) for word in words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_each_image_is_computed_in_a_batch_of_its_size(tmp_path: Path, predictor: Predictor) -> None:
    sizes = []

    class Watched(Predictor):
        def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
            sizes.append(len(images))
            return predictor.predict(images)

    capture(tmp_path, predictor)
    (captured,) = read_captures(tmp_path)
    again = compute_again(captured, Watched(None, predictor.model))
    assert sizes == [1, 1, 2, 3, 3]
    assert again.tobytes() == captured.probabilities.tobytes()
    with pytest.raises(DataError, match="has an invalid batch size"):
        compute_again(replace(captured, batch_sizes=captured.batch_sizes * 10**8), predictor)
