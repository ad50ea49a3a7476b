"""The predictor: what it answers, what it refuses, and that it stands without torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from image_classifier.errors import DataError, ModelError
from image_classifier.published.folder import CARD, MANIFEST, MODEL, serialize_manifest
from image_classifier.published.predictor import METADATA_PREFIX, build_predictor, load_predictor
from tests.bombs import build_onnx_of_zeros
from tests.conftest import PROJECT, run_program
from tests.serving import draw_images, write_model

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


def test_it_answers_the_same_for_any_size_of_a_batch(published_run: Path) -> None:
    predictor = load_predictor(published_run, num_threads=1)
    whole = predictor.predict(IMAGES)
    assert whole.shape == (5, 10)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate([predictor.predict(IMAGES[i : i + 1]) for i in range(5)]), whole, atol=1e-6
    )
    assert predictor.predict(IMAGES[:0]).shape == (0, 10)


def test_what_is_alone_gets_the_same_answers(published_run: Path) -> None:
    predictor = load_predictor(published_run, num_threads=1, num_lone_threads=2)
    expected = predictor.predict(IMAGES)
    np.testing.assert_allclose(predictor.predict(IMAGES, is_alone=True), expected, atol=1e-6)
    assert predictor.seconds_per_image == np.inf
    predictor.measure()
    assert 0 < predictor.seconds_per_image < 1
    np.testing.assert_allclose(predictor.predict(IMAGES, is_alone=True), expected, atol=1e-6)


def test_it_says_what_it_is_a_model_of(published_run: Path) -> None:
    model = load_predictor(published_run).model
    manifest = json.loads((published_run / MANIFEST).read_text())
    assert (model.experiment_name, model.run_name) == ("experiment", "run")
    assert (model.data_digest, list(model.classes)) == (manifest["data_digest"], manifest["classes"])
    assert model.version == manifest["files"][MODEL]["sha256"][:12]
    assert load_predictor(published_run / MODEL, version="7").model.version == "7"


@pytest.mark.parametrize(
    "images",
    [IMAGES.astype(np.float32), IMAGES[:, :, :, 0], IMAGES.transpose(0, 3, 1, 2)],
    ids=["type", "grey", "order"],
)
def test_images_of_another_type_or_shape_are_refused(published_run: Path, images: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=r"uint8 \[N, 32, 32, 3\], got"):
        load_predictor(published_run).predict(images)


@pytest.mark.parametrize("side", [32, 64, 224])
def test_it_takes_images_of_the_side_that_the_graph_has(side: int, tmp_path: Path) -> None:
    predictor = load_predictor(write_model(tmp_path / "model.onnx", side=side))
    assert predictor.model.image_size == side
    predictor.measure()
    assert predictor.predict(draw_images(3, side=side)).shape == (3, 10)
    other = 64 if side == 32 else 32
    with pytest.raises(DataError, match=rf"uint8 \[N, {side}, {side}, 3\], got: uint8 \[3, {other}, {other}, 3\]"):
        predictor.predict(draw_images(3, side=other))


def test_a_graph_of_other_sides_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no valid input of square images of 32, 64, 96, 128, 224 pixels"):
        load_predictor(write_model(tmp_path / "model.onnx", side=48))


def test_it_never_imports_torch(published_run: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from image_classifier.published.predictor import load_predictor;"
        f"predictor = load_predictor(Path({str(published_run)!r}));"
        "print(predictor.predict(np.zeros((1, 32, 32, 3), np.uint8)).shape, 'torch' in sys.modules)"
    )
    assert run_program(sys.executable, "-c", program, cwd=PROJECT) == "(1, 10) False\n"


def test_a_model_that_is_missing_or_no_model_is_refused(tmp_path: Path, published_run: Path) -> None:
    with pytest.raises(ModelError, match="no published model"):
        load_predictor(tmp_path / "nothing.onnx")
    (tmp_path / MANIFEST).write_text("{}")  # of a run, which was not published
    with pytest.raises(ModelError, match="no published model .*/published; publish a run first"):
        load_predictor(tmp_path / "published")
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ModelError, match="has no manifest.json"):
        load_predictor(tmp_path)
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime"):
        load_predictor(tmp_path / "noise.onnx")
    stranger = onnx.load(published_run / MODEL)
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    with pytest.raises(ModelError, match="not a model published by this package"):
        load_predictor(tmp_path / "stranger.onnx")


def test_a_model_that_speaks_of_itself_in_no_text_is_refused(tmp_path: Path, published_run: Path) -> None:
    content = (published_run / MODEL).read_bytes()
    digest = f"{METADATA_PREFIX}data_digest".encode() + b"\x12@"
    start = content.index(digest) + len(digest)
    (tmp_path / "model.onnx").write_bytes(content[:start] + b"\xeb" + content[start + 1 :])
    with pytest.raises(ModelError, match="not a model published by this package: it has no valid .*can't decode byte"):
        load_predictor(tmp_path / "model.onnx")


def test_a_model_that_cannot_be_computed_is_refused_when_it_is_measured(tmp_path: Path, published_run: Path) -> None:
    narrow = onnx.load(published_run / MODEL)
    for entry in narrow.metadata_props:
        if entry.key == f"{METADATA_PREFIX}classes":
            entry.value = '["cat", "dog"]'
    onnx.save(narrow, tmp_path / "narrow.onnx")
    with pytest.raises(ModelError, match=r"cannot be computed: it returns \(10,\) values per image for 2 classes"):
        load_predictor(tmp_path / "narrow.onnx").measure()


def test_a_later_format_is_refused(tmp_path: Path, published_run: Path) -> None:
    model = onnx.load(published_run / MODEL)
    for entry in model.metadata_props:
        if entry.key == f"{METADATA_PREFIX}format_version":
            entry.value = "2"
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(ModelError, match="has the format 2; this version reads up to 1"):
        load_predictor(tmp_path / "later.onnx")
    folder = shutil.copytree(published_run, tmp_path / "later")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest | {"format_version": 2}))
    with pytest.raises(ModelError, match="has the format 2"):
        load_predictor(folder)


def test_an_opset_of_the_future_is_refused_in_one_line(tmp_path: Path, published_run: Path) -> None:
    model = onnx.load(published_run / MODEL)
    model.opset_import[0].version = 99
    (tmp_path / "future.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime") as caught:
        load_predictor(tmp_path / "future.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, reason",
    [
        (build_onnx_of_zeros(10**10), "takes more than 1024 MB of memory to read; get it again"),
        (build_onnx_of_zeros(2 * 10**8), "takes more than 1024 MB of memory to read; get it again"),
        (build_onnx_of_zeros(10), "is not a model published by this package"),
        (b"noise", "cannot be loaded by ONNX Runtime .*: .*"),
    ],
    ids=["40 GB", "0.8 GB twice", "small", "noise"],
)
def test_a_model_is_loaded_within_limits_first(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=f"^{tmp_path}/model.onnx {reason}"):
        load_predictor(tmp_path / "model.onnx")


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "/dev/zero", "sub/../weights.bin"])
def test_weights_in_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Nobody has checked them; ONNX Runtime would look for them in the current folder."""
    path = write_model(tmp_path / "model.onnx")
    model = onnx.load(path)
    (weights,) = (each for each in model.graph.initializer if each.name == "matrix")
    (tmp_path / "work").mkdir()
    for folder in (tmp_path, tmp_path / "work"):
        (folder / "weights.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=place)
    content = model.SerializeToString()
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path / "work")
    for is_signed in (False, True):  # what is signed is not loaded in a process of its own first
        with pytest.raises(ModelError, match="cannot be loaded"):
            build_predictor(content, path, is_signed=is_signed)


def test_card_and_manifest_are_those_that_were_checked(published_run: Path) -> None:
    model = load_predictor(published_run).model
    assert model.card == (published_run / CARD).read_bytes()
    assert model.manifest == (published_run / MANIFEST).read_bytes()
