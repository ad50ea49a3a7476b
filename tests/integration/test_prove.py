"""Whether an image is in what a run trained on, in which steps it was seen, and runs whose digests are of before."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_classifier.choices import Sampler
from image_classifier.cli.compare import main as compare
from image_classifier.cli.data import main as data
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot, compute_flat_digest
from image_classifier.errors import SettingsError
from image_classifier.experiment import run
from image_classifier.preparation import build_loader, split_training_set
from image_classifier.publishing.registry import Proof
from image_classifier.settings import restore_training_settings
from image_classifier.tracking.checking import verify_files
from image_classifier.tracking.reading import read_record
from image_classifier.tracking.seen import find_steps
from image_classifier.tracking.trace import Where, trace
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.tiny import make_settings, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 200 images to train and 60 to test with."""
    return write_tiny_dataset(tmp_path_factory.mktemp("prove") / "data")


@pytest.fixture(scope="module")
def snapshot(dataset: Path) -> Snapshot:
    """Its snapshot."""
    return load_snapshot(dataset)


@pytest.fixture(scope="module")
def trained(dataset: Path) -> Path:
    """A run of two epochs that has set images aside."""
    return run(make_settings(dataset.parent / "runs", dataset, validation_fraction=0.1, num_epochs=2)).folder


@pytest.fixture(scope="module")
def older(dataset: Path, snapshot: Snapshot) -> Path:
    """A run as an earlier version left it: its record has the digest of format 1."""
    flat = compute_flat_digest(snapshot.images, snapshot.labels, snapshot.classes, snapshot.num_train)
    settings = make_settings(dataset.parent / "older", dataset, num_epochs=1, checkpoint_every="10steps")
    return run(settings, snapshot=snapshot.recognize(flat)).folder


def save_png(image: Any, path: Path) -> Path:
    Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return path


@pytest.mark.parametrize("sampler", ["uniform", "balanced"])
def test_the_steps_are_those_whose_batches_held_the_image(sampler: Sampler, trained: Path, snapshot: Snapshot) -> None:
    record = read_record(trained)
    training = replace(restore_training_settings(record["settings"]), sampler=sampler)
    record["settings"]["sampler"] = sampler
    indices, validated = split_training_set(snapshot, training)
    loader = build_loader(snapshot, indices, training, num_workers=0)
    batches = [batch.images.numpy() for batch in loader.iterate(2)]
    for index in (*indices[:4], *indices[-4:]):
        held = [np.all(images == snapshot.images[index], axis=(1, 2, 3)).any() for images in batches]
        steps = find_steps(record, snapshot.num_train, len(batches), int(index), snapshot.labels[: snapshot.num_train])
        assert steps == (1 + np.flatnonzero(held)).tolist()
    assert find_steps(record, snapshot.num_train, 36, int(validated[0]), snapshot.labels[:200]) is None
    assert find_steps(record, snapshot.num_train, 0, int(indices[0]), snapshot.labels[:200]) == []
    if sampler == "balanced":
        with pytest.raises(SettingsError, match="depends on the labels of all images"):
            find_steps(record, snapshot.num_train, 36, 0)


def test_what_no_run_can_have_gone_through_is_not_computed(trained: Path) -> None:
    record = read_record(trained)
    record["settings"]["num_epochs"] = 10**15
    for num_train, num_steps in ((2**62, 10), (200, 2**62)):
        with pytest.raises(SettingsError, match="the order can be computed for at most 100,000,000 images"):
            find_steps(record, num_train, num_steps, 0)


def test_an_image_file_is_proved_and_the_proof_needs_no_data(
    trained: Path, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on, _ = split_training_set(snapshot, restore_training_settings(read_record(trained)["settings"]))
    number = int(trained_on[3])
    image, proof = save_png(snapshot.images[number], tmp_path / "image.png"), tmp_path / "proof.json"
    assert data(["prove", str(image), str(trained), "--output", str(proof)]) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"IN THE DATA\n  image {number} of the train part, class ")
    steps = find_steps(read_record(trained), 200, 36, number)
    assert steps is not None and f"tiny/run has seen it in 2 of 36 steps: {', '.join(map(str, steps))}\n" in first
    for same in (str(number), re.findall('"image_digest": "(.*)"', proof.read_text())[0]):
        assert data(["prove", same, str(trained)]) == 0
        assert capsys.readouterr().out == first

    record = tmp_path / "alone"
    record.mkdir()
    for name in ("run.json", "digests.jsonl"):
        shutil.copy(trained / name, record)
    assert data(["check-proof", str(proof), "--run", str(record), "--image", str(image)]) == 0
    assert capsys.readouterr().out == first.replace("IN THE DATA", f"ACCEPTED\n  data {snapshot.digest}")
    assert data(["check-proof", str(proof), "--data_digest", snapshot.digest.upper()]) == 0
    assert "steps" not in capsys.readouterr().out
    other = save_png(snapshot.images[number + 1], tmp_path / "other.png")
    for words, refusal in (
        (["--data_digest", "0" * 64], "proves nothing: it is about data of the digest"),
        (["--data_digest", "0" * 63], "takes 64 hexadecimal digits"),
        ([], "give the data set's --data_digest, or the --run that has it"),
        (["--run", str(record), "--image", str(other)], "is about other pixels than"),
        (["--run", str(record), "--image", str(proof)], "proof.json"),
    ):
        assert data(["check-proof", str(proof), *words]) == 2
        message = capsys.readouterr().err
        assert refusal in message and message.count("\n") == 1


def test_what_is_not_trained_on_or_not_there_is_said(
    trained: Path, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, validated = split_training_set(snapshot, restore_training_settings(read_record(trained)["settings"]))
    for image, words in (
        (str(validated[0]), "tiny/run has set it aside to validate on, and not trained on it"),
        ("210", "  image 10 of the test part, .*\n  tiny/run has tested on it, and not trained on it"),
        ("0" * 64, "NOT IN THE DATA\n  no image of sample .*\n  an image that was resized or encoded otherwise has"),
    ):
        assert data(["prove", image, str(trained)]) == 0
        assert re.search(words, capsys.readouterr().out)
    for image, refusal in (
        ("260", "sample has no image 260: it has 0 to 259"),
        ("none.png", "none.png: No such file or directory"),
        ("0" * 64, "no proof says that an image is absent; leave --output out"),
    ):
        assert data(["prove", image, str(trained), "--output", str(tmp_path / "proof.json")]) == 2
        assert refusal in capsys.readouterr().err and not list(tmp_path.iterdir())
    other = write_tiny_dataset(tmp_path / "other", seed=1)
    assert data(["prove", "0", str(trained), "--dataset_folder", str(other)]) == 2
    assert "--dataset_folder says where that lies" in capsys.readouterr().err


def test_models_of_before_and_after_are_known_to_be_of_the_same_data(
    older: Path, dataset: Path, snapshot: Snapshot
) -> None:
    flat, proof = read_record(older)["data"]["digest"], Proof(dataset_folder=dataset)
    assert proof.is_same_data(flat, snapshot.digest) and proof.is_same_data("0" * 64, "0" * 64)
    assert not proof.is_same_data("0" * 64, snapshot.digest)
    believing = Proof(public_key=dataset / "key.pem")  # who looks at no data, and cannot tell
    assert believing.is_same_data(flat, flat) and not believing.is_same_data(flat, snapshot.digest)


def test_a_run_of_before_is_verified_resumed_traced_and_compared_by_its_own_digest(
    older: Path, dataset: Path, snapshot: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = read_record(older)["data"]
    assert (recorded["digest"] != snapshot.digest, recorded["digest_format"]) == (True, 1)
    for segment in (None, "10:20"):
        assert verify(VerificationSettings(run_folder=older, segment=segment)).verdict is Verdict.IDENTICAL
    links = {link.name: link for link in trace(str(older), Where(older.parents[1], None))}
    assert (links["data"].state, links["data"].digest) == ("equal", recorded["digest"])

    assert data(["prove", "5", str(older)]) == 0
    assert "has seen it in 1 of 20 steps" in capsys.readouterr().out
    assert data(["prove", "5", str(older), "--output", str(tmp_path / "proof.json")]) == 2
    assert "made by an earlier version, whose digest is over all images at once" in capsys.readouterr().err

    newer = run(make_settings(tmp_path, dataset, "newer", num_epochs=1)).folder
    assert read_record(newer)["data"]["digest"] == snapshot.digest
    assert compare([str(older), str(newer)]) == 0
    assert "different data" not in capsys.readouterr().out
    dataset.rename(tmp_path / "moved")  # now nothing is there that could tell
    assert compare([str(older), str(newer)]) == 2
    assert "have data digests of two formats" in capsys.readouterr().err
    (tmp_path / "moved").rename(dataset)

    shutil.copytree(older, tmp_path / "tiny" / "run")
    again = tmp_path / "tiny" / "run"
    (again / "manifest.json").unlink()
    shutil.rmtree(max((again / "checkpoints").iterdir()))
    run(make_settings(tmp_path, dataset, num_epochs=1, checkpoint_every="10steps", resume=True))
    assert read_record(again)["data"] == recorded and verify_files(again) == ()
