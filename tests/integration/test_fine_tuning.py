"""Training that starts from weights of other classes: what is kept, what is new, what stays, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from image_classifier.cli.train import main as train_main
from image_classifier.cli.verify import main as verify_main
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import Interrupted
from image_classifier.experiment import run
from image_classifier.preparation import build_initial_classifier
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.pretrained import load_pretrained
from image_classifier.tracking.reading import read_chain, read_manifest, read_record
from image_classifier.training.determinism import resolve_settings
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.conftest import PROJECT, leave_out_coverage, run_command, wait_until
from tests.datasets import Arrays, write_image_folder
from tests.tiny import make_settings, write_tiny_dataset

OLD, NEW = ("cross", "circle", "star", "square"), ("star", "dots", "circle")
"""Classes that were trained on, and those that are: two of them, in another order, and one that is new."""

FROZEN: dict[str, Any] = {"freeze": "body", "learning_rate": 0.1, "digest_every": 2}
SLOW_BODY: dict[str, Any] = {"body_learning_rate": 0.002, "learning_rate": 0.05, "digest_every": 2}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return load_snapshot(write_tiny_dataset(tmp_path_factory.mktemp("data") / "sample", num_train=300, num_test=100))


def write_classes(folder: Path, sample: Snapshot, classes: Sequence[str]) -> Path:
    """Write the images of some classes as a folder of images with metadata that keeps the classes' order."""
    places = [index for index, label in enumerate(sample.labels) if sample.classes[label] in classes]
    labels = [classes.index(sample.classes[sample.labels[place]]) for place in places]
    num_train = sum(place < sample.num_train for place in places)
    write_image_folder(folder, Arrays(sample.images[places], sample.labels[places] * 0 + labels, num_train), classes)
    (folder / "metadata.json").write_text(json.dumps({"format_version": 1, "classes": list(classes)}))
    return folder


@pytest.fixture(scope="module")
def old_data(sample: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "old", sample, OLD)


@pytest.fixture(scope="module")
def new_data(sample: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "new", sample, NEW)


@pytest.fixture(scope="module")
def pretrained(old_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network, which has batch norm, trained on the old classes; its model.pth."""
    settings = make_settings(tmp_path_factory.mktemp("old"), old_data, model="resnet", input_mean=(0.4, 0.45, 0.5))
    return run(settings).folder / "model.pth"


def fine_tune(experiments: Path, new_data: Path, pretrained: Path, name: str = "run", **values: Any) -> Any:
    """Make settings of a run on the new classes from the pretrained weights."""
    settings = {"model": "resnet", "input_mean": (0.4, 0.45, 0.5), "num_epochs": 2, **values}
    return make_settings(experiments, new_data, name, pretrained_model=pretrained, **settings)


def get_state(path: Path) -> dict[str, Tensor]:
    return load_model(path).classifier.state_dict()


def list_different(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])}


def test_the_head_keeps_the_rows_of_classes_of_the_same_name_and_all_else_is_taken_over(
    pretrained: Path, new_data: Path, tmp_path: Path
) -> None:
    training = resolve_settings(fine_tune(tmp_path, new_data, pretrained).training)
    snapshot = load_snapshot(new_data)
    assert snapshot.classes == NEW
    start = build_initial_classifier(training, snapshot, snapshot.labels, load_pretrained(pretrained)).state_dict()
    drawn = build_initial_classifier(training, snapshot, snapshot.labels, None).state_dict()
    old = get_state(pretrained)
    head = {"network.head.weight", "network.head.bias"}
    for name in head:
        expected = torch.stack([old[name][OLD.index("star")], drawn[name][1], old[name][OLD.index("circle")]])
        assert torch.equal(start[name], expected)
    assert list_different({**start, **{name: old[name] for name in head}}, old) == set()


def test_a_frozen_body_is_the_same_at_the_end_and_the_record_says_where_it_comes_from(
    pretrained: Path, new_data: Path, tmp_path: Path
) -> None:
    kept: dict[str, Any] = {"checkpoint_every": "2steps", "keep_checkpoints": "all"}
    result = run(fine_tune(tmp_path, new_data, pretrained, **FROZEN, **kept))
    (shared,) = (result.folder / "checkpoints").glob("frozen-*.pth")
    states = list((result.folder / "checkpoints").glob("*/state.pth"))
    assert len(states) > 1 and all(5 * path.stat().st_size < shared.stat().st_size for path in states)
    settings = VerificationSettings(run_folder=result.folder, num_workers=0, segment="2:4")
    assert verify(settings).verdict is Verdict.IDENTICAL
    old, new = get_state(pretrained), get_state(result.folder / "model.pth")
    head = {"network.head.weight", "network.head.bias"}
    assert list_different({**new, **{name: old[name] for name in head}}, old) == set()
    assert new["network.head.weight"].shape == (3, 128)
    record = read_record(result.folder)
    assert record["pretrained"] == {
        "path": str(pretrained),
        "digest": hashlib.sha256(pretrained.read_bytes()).hexdigest(),
        "classes": list(OLD),
        "kept_classes": ["star", "circle"],
        "settings": [],
    }
    assert record["settings"]["freeze"] == "body" and record["settings"]["body_learning_rate"] is None
    slow = get_state(run(fine_tune(tmp_path, new_data, pretrained, "slow", **SLOW_BODY)).folder / "model.pth")
    whole = get_state(run(fine_tune(tmp_path, new_data, pretrained, "w", learning_rate=0.05)).folder / "model.pth")
    name = "network.stem.conv.weight"
    assert 0 < (slow[name] - old[name]).norm() < (whole[name] - old[name]).norm()


@pytest.mark.parametrize("values", [FROZEN, SLOW_BODY], ids=["frozen", "slow"])
@pytest.mark.parametrize("instruction_set", ["native", "portable"])
def test_an_interrupted_run_goes_on_with_the_same_bits_and_is_verified(
    values: dict[str, Any], instruction_set: str, pretrained: Path, new_data: Path, tmp_path: Path
) -> None:
    settings = {**values, "instruction_set": instruction_set, "shards": 2}
    whole = run(fine_tune(tmp_path / "whole", new_data, pretrained, num_threads=2, **settings))
    with pytest.raises(Interrupted):
        parts = fine_tune(tmp_path / "parts", new_data, pretrained, **settings)
        run(parts, should_stop=iter([False] * 4 + [True]).__next__)
    result = run(fine_tune(tmp_path / "parts", new_data, pretrained, resume=True, **settings))
    assert read_chain(result.folder) == read_chain(whole.folder) and result.weights_digest == whole.weights_digest
    assert verify(VerificationSettings(run_folder=whole.folder, num_workers=0)).verdict is Verdict.IDENTICAL


def test_classes_in_another_order_have_their_rows_and_may_be_evaluated_alone(
    pretrained: Path, sample: Snapshot, tmp_path: Path
) -> None:
    turned = write_classes(tmp_path / "turned", sample, OLD[::-1])
    result = run(fine_tune(tmp_path / "e", turned, pretrained, num_epochs=0))
    assert result.evaluation["accuracy"] == json.loads((pretrained.parent / "evaluation.json").read_text())["accuracy"]
    assert read_record(result.folder)["pretrained"]["kept_classes"] == list(OLD[::-1])


def train(*words: object) -> int:
    names = ["--experiment_name", "e", "--run_name", "run", "--device", "cpu", "--num_threads", "1"]
    return train_main([*map(str, words), *names])


def test_network_and_scaling_come_from_the_weights_unless_an_option_asks_for_others(
    pretrained: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--experiments_folder", tmp_path, "--dataset_folder", new_data, "--pretrained_model", pretrained]
    words += ["--recipe", "notebook", "--batch_size", 10, "--num_epochs", 1]
    assert train(*words) == 0
    shown = capsys.readouterr().err.splitlines()
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()[:12]
    assert f"starts from {pretrained} (sha256 {digest})" in shown
    assert "the head keeps the rows of star, circle; it is new for dots" in shown
    says = "the weights say model resnet, input_mean [0.4, 0.45, 0.5], input_std [0.5, 0.5, 0.5]"
    assert any(line.startswith(says) for line in shown)
    record = read_record(tmp_path / "e" / "run")
    assert record["settings"]["model"] == "resnet" and record["settings"]["input_mean"] == [0.4, 0.45, 0.5]
    assert record["pretrained"]["settings"][:3] == ["model", "input_mean", "input_std"]
    assert train(*words[:2], "--resume") == 0

    other = [*words, "--experiments_folder", tmp_path / "other"]
    for options, reason in (
        (["--model", "lenet"], "has the network resnet, not lenet; choose --model resnet"),
        (["--input_std", "0.5,0.5,0.4"], "was trained with --input_std [0.5, 0.5, 0.5]; set the same"),
        (["--num_epochs", 0], "--num_epochs 0 evaluates, but --pretrained_model"),
        (["--optimizer", "muon", "--nesterov", "true"], "--optimizer muon has rates for the airbench networks"),
        (["--pretrained_model", "torchvision:resnet18"], "torchvision:NETWORK@WEIGHTS"),
        (["--pretrained_model", tmp_path / "no.pth"], f"there is no model file {tmp_path / 'no.pth'}"),
    ):
        assert train(*other, *options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line and line.startswith("error: ")
    assert not (tmp_path / "other").exists()


def test_what_is_frozen_must_have_been_trained(
    new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--experiments_folder", tmp_path / "e", "--dataset_folder", new_data, "--recipe", "notebook"]
    assert train(*words, "--freeze", "body") == 2
    assert "--freeze body leaves weights as they are, which nobody has trained" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_an_image_size_that_the_weights_are_not_of_is_noted(
    pretrained: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--experiments_folder", tmp_path, "--dataset_folder", new_data, "--pretrained_model", pretrained]
    assert train(*words, "--recipe", "notebook", "--batch_size", 10, "--num_epochs", 1, "--image_sizes", 24) == 0
    assert "note: the weights of --pretrained_model are of images of 32 pixels, not 24" in capsys.readouterr().err


def test_verify_needs_the_same_weights_and_says_what_is_missing(
    pretrained: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(pretrained.read_bytes())
    folder = run(fine_tune(tmp_path / "e", new_data, weights, **FROZEN)).folder
    content = torch.load(weights, weights_only=True)
    content["state"]["network.head.bias"] += 1
    torch.save(content, weights)
    assert verify_main([str(folder)]) == 2
    assert "different pretrained: its digest was " in capsys.readouterr().err
    weights.unlink()
    assert verify_main([str(folder)]) == 2
    assert f"there is no model file {weights}" in capsys.readouterr().err


LAUNCHER = "-m torch.distributed.run --nproc_per_node 2 --max_restarts 0".split()


@pytest.fixture(scope="module")
def long_training(pretrained: Path, new_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a fine-tuning, to which the experiments folder is added, and the folder of its uninterrupted run."""
    options = f"""--experiment_name e --run_name run --dataset_folder {new_data} --pretrained_model {pretrained}
        --recipe notebook --batch_size 12 --shards 4 --num_epochs 60 --freeze body --learning_rate 0.05
        --checkpoint_every 5steps --digest_every 5 --num_threads 1 --device cpu""".split()
    trainer = ["-m", "image_classifier.main", *options, "--experiments_folder"]
    whole = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, *trainer, whole], check=True, env=environment(), timeout=200)
    return trainer, whole / "e" / "run"


def environment() -> dict[str, str]:
    return {**leave_out_coverage(), "PYTHONPATH": str(PROJECT)}


@pytest.mark.parametrize(("launcher", "sent"), [(LAUNCHER, signal.SIGTERM), ([], signal.SIGKILL)], ids=("ranks", "one"))
def test_a_killed_fine_tuning_goes_on_in_one_process_with_the_same_bits(
    launcher: list[str], sent: signal.Signals, long_training: tuple[list[str], Path], tmp_path: Path
) -> None:
    trainer, whole = long_training
    words, pipe = [sys.executable, *launcher, *trainer, str(tmp_path)], subprocess.PIPE
    killed = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=pipe, stderr=pipe)
    folder = tmp_path / "e" / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    wait_until(lambda: bool(checkpoints.list_steps()), killed)
    os.kill(killed.pid, sent)
    killed.communicate(timeout=100)
    assert killed.returncode == -sent if sent is signal.SIGKILL else killed.returncode
    assert checkpoints.list_steps() and not is_finished(folder)
    resumed = [sys.executable, *trainer, str(tmp_path), "--resume"]
    assert subprocess.run(resumed, cwd=tmp_path, env=environment(), timeout=200).returncode == 0
    assert read_chain(folder) == read_chain(whole)
    assert read_manifest(folder)["weights_digest"] == read_manifest(whole)["weights_digest"]


def test_a_fine_tuned_run_is_evaluated_and_published(pretrained: Path, new_data: Path, tmp_path: Path) -> None:
    folder = run(fine_tune(tmp_path, new_data, pretrained, **FROZEN)).folder
    for command in ("evaluate", "publish"):
        run_command("image_classifier", command, folder)
    card = (folder / "published" / "MODEL_CARD.md").read_text()
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert f"It started from weights of the sha256 `{digest}`: the head keeps the rows of star, circle; it is" in card
