"""Images of more than 32 pixels, from a folder to the answers of a server: real ones, scaled up."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from image_classifier.cli import data, evaluate, predict, publish, report, train, verify
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import Interrupted
from image_classifier.experiment import run
from image_classifier.image_sizes import ImageSize
from image_classifier.imaging import load_image
from image_classifier.published.predictor import load_predictor
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.reading import read_manifest, read_record
from tests.conftest import require_real_data
from tests.datasets import OURS
from tests.serving import PIXELS, encode, serving

NUM_TRAIN, NUM_TEST = 160, 60
SETTINGS = {64: ("airbench_small", "small"), 128: ("resnet", "quick")}
"""Network and recipe of each size that is tried."""


def load_real(name: str, count: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Load the first images [32, 32, 3] of one of CIFAR-10's files, and their labels."""
    folder = require_real_data("IMAGE_CLASSIFIER_CIFAR10") / "cifar-10-batches-py"
    batch = pickle.loads((folder / name).read_bytes(), encoding="latin-1")
    images = np.asarray(batch["data"][:count], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    yield from zip(images, batch["labels"][:count], strict=True)


def write_real(folder: Path, side: int) -> Path:
    """Write crops of real images, scaled up to a side in pixels, as images by class."""
    for part, name, count in (("train", "data_batch_1", NUM_TRAIN), ("test", "test_batch", NUM_TEST)):
        for number, (pixels, label) in enumerate(load_real(name, count)):
            image = Image.fromarray(pixels[2:30, 2:30]).resize((side, side), Image.Resampling.BICUBIC)
            place = folder / part / OURS[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:05d}.png")
    return folder


def make_settings(experiments: Path, dataset: Path, side: ImageSize, run_name: str = "run") -> RunSettings:
    model, recipe = SETTINGS[side]
    changes = {"model": model, "num_epochs": 1, "batch_size": 40, "digest_every": 1, "device": "cpu"}
    if model == "resnet":
        changes |= {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return RunSettings(
        experiments_folder=experiments,
        experiment_name="sizes",
        run_name=run_name,
        dataset_folder=dataset,
        fit="refuse",
        num_threads=1,
        num_workers=1,
        checkpoint_every="1steps",
        training=TrainingSettings.from_recipe(recipe, image_size=side, **changes),
        recipe=recipe,
    )


@pytest.mark.parametrize("side", [64, 128])
def test_images_of_a_larger_side_go_all_the_way(
    side: ImageSize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_real(tmp_path / "real", side)
    snapshot = load_snapshot(dataset)
    assert snapshot.image_size == 32  # unless another is asked for
    assert data.main(["prepare", "--dataset_folder", str(dataset), "--image_size", str(side)]) == 0
    settings = make_settings(tmp_path / "e", dataset, side)
    folder = settings.run_folder

    steps: list[int] = []

    def should_stop() -> bool:
        steps.append(1)
        return len(steps) == 2

    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        run(settings, should_stop=should_stop)
    words = ["--experiments_folder", str(tmp_path / "e"), "--experiment_name", "sizes", "--run_name", "run"]
    assert train.main([*words, "--resume"]) == 0
    straight = run(make_settings(tmp_path / "e", dataset, side, "straight")).folder
    for key in ("weights_digest", "chain_head"):
        assert read_manifest(folder)[key] == read_manifest(straight)[key]

    record = read_record(folder)
    assert (record["settings"]["image_size"], record["settings"]["image_sizes"][-1]) in ((64, 64), (128, 96))
    assert record["data"]["digest"] != snapshot.digest and not record["data"]["findings"]["num_fitted"]
    assert load_model(folder / "model.pth").input_size == side
    capsys.readouterr()
    assert verify.main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL")
    assert report.main([str(folder)]) == 0
    assert evaluate.main([str(folder), "--output", str(tmp_path / "own.json")]) == 0
    assert evaluate.main([str(folder), "--dataset_folder", str(dataset), "--output", str(tmp_path / "named.json")]) == 0
    own, named = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "named.json"))
    assert own == named and own["data"]["is_data_of_run"]
    assert own["accuracy"] == json.loads((folder / "evaluation.json").read_text())["accuracy"]

    assert publish.main([str(folder)]) == 0
    published = folder / "published"
    parity = json.loads((published / "parity.json").read_text())
    assert parity["num_images"] == NUM_TEST
    assert all(line["agreement"] == 1 or line["num_ties"] for line in parity["fp32"])
    assert json.loads((published / "manifest.json").read_text())["image_size"] == side
    assert f"uint8 [N, {side}, {side}, 3]" in (published / "MODEL_CARD.md").read_text()
    assert_served_as_predicted(published, dataset, side, tmp_path)


def assert_served_as_predicted(published: Path, dataset: Path, side: int, folder: Path) -> None:
    """Each way in gives the answers that the published model has, which `predict` writes too."""
    files = sorted(dataset.glob("test/*/*.png"))[:5]
    images = np.stack([load_image(path, side=side) for path in files])
    expected = load_predictor(published).predict(images)
    assert predict.main([str(published), *map(str, files), "--output", str(folder / "out.csv")]) == 0
    rows = [line.split(",")[3:] for line in (folder / "out.csv").read_text().splitlines()[1:]]
    np.testing.assert_allclose(np.array(rows, float), expected, atol=2e-6)
    with serving(published, folder / "log", "--model_name", "model") as server:
        shown = httpx.get(f"{server.url}/model").json()
        assert shown["input"]["shape"] == [None, side, side, 3] and shown["image_size"] == side
        answers = [httpx.post(f"{server.url}/predict", content=images.tobytes(), headers=PIXELS).json()["predictions"]]
        kind = {"content-type": "image/png"}
        alone = [(path.read_bytes(), kind) for path in files], [(image.tobytes(), PIXELS) for image in images]
        for bodies in alone:
            replies = [httpx.post(f"{server.url}/predict", content=body, headers=head).json() for body, head in bodies]
            answers.append([reply["predictions"][0] for reply in replies])
        for predictions in answers:
            for prediction, row in zip(predictions, expected, strict=True):
                assert prediction["class"] == shown["classes"][row.argmax()]
                assert prediction["probability"] == pytest.approx(row.max(), abs=2e-6)
        small = encode(images[0][:20, :30])  # which is resized to the model's side
        seen = httpx.post(f"{server.url}/predict?show_input=true", content=small, headers=kind).json()
        assert len(seen["predictions"][0]["input"]) == 4 * side**2

        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
        url = f"{server.url}/v2/models/model"
        assert httpx.get(url).json()["inputs"][0]["shape"] == [-1, side, side, 3]
        request = {"inputs": [{**tensor, "shape": [2, side, side, 3], "data": images[:2].tolist()}]}
        (output,) = httpx.post(f"{url}/infer", json=request).json()["outputs"]
        np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected[:2], atol=1e-6)
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": images.nbytes}}]}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        (output,) = httpx.post(f"{url}/infer", content=head + images.tobytes(), headers=length).json()["outputs"]
        np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, atol=1e-6)
        assert httpx.post(f"{server.url}/predict", content=bytes(3072), headers=PIXELS).status_code == 400


def test_a_size_that_a_network_cannot_take_or_that_there_is_not_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--experiments_folder", str(tmp_path / "e"), "--experiment_name", "sizes", "--run_name", "run"]
    words += ["--dataset_folder", str(tmp_path / "data")]
    for options, complaint in (
        (["--image_size", "48"], "--image_size takes one of 32, 64, 96, 128, 224, got: 48"),
        (["--image_size", "64", "--recipe", "notebook"], "--model lenet has no normalisation"),
        (["--image_sizes", "256"], "--image_sizes takes whole numbers from 16 to 224"),
        (["--image_size", "64", "--translate", "33"], "--translate takes a whole number from 0 to 32, got: 33"),
    ):
        assert train.main([*words, *options]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
