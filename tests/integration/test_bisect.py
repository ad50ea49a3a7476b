"""Where two runs part: each fault that was put in is found at its step, in its tensor and operator, with its cause."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from image_classifier import experiment
from image_classifier.bisection import BisectionSettings, Finding, bisect
from image_classifier.cli.bisect import format_finding, main
from image_classifier.data.augment import compute_order
from image_classifier.tracking.causes import Kind
from image_classifier.tracking.reading import read_record
from image_classifier.training.determinism import get_instruction_set
from tests import faults
from tests.conftest import run_command
from tests.faults import Fault, lasting, transient
from tests.runs import reseal
from tests.tiny import make_settings, write_tiny_dataset

NUM_STEPS = 40
MOST_SEGMENTS = math.log2(NUM_STEPS) + 2
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def train(experiments: Path, dataset: Path, name: str, **values: Any) -> Path:
    settings = make_settings(experiments, dataset, name, checkpoint_every="10steps", keep_checkpoints="all", **values)
    return experiment.run(settings).folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of 40 steps without a fault, with a digest and a checkpoint every 10."""
    return train(tmp_path_factory.mktemp("sound"), dataset, "a")


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run one of whose weights lost a bit after step 20, where it has a checkpoint."""
    with transient(faults.flip_weight(20, "network.fc1.weight", 777, 22)):
        return train(tmp_path_factory.mktemp("flipped"), dataset, "b")


def find(*runs: Path) -> Finding:
    finding = bisect(BisectionSettings(runs=runs, num_threads=1, num_workers=0))
    assert len(finding.segments) <= MOST_SEGMENTS
    assert len(format_finding(finding).splitlines()) <= 40
    return finding


IMAGE = 7
ORDER = compute_order(0, 0, 200)
STEP_OF_IMAGE = int(np.flatnonzero(ORDER == IMAGE)[0]) // 10 + 1


@dataclass(frozen=True)
class Case:
    """A fault of run b, and what is to be found.

    Attributes:
        byte: of the image's record in the data set that is changed; 0 is its label.
    """

    step: int
    phase: str
    layer: str
    operator: str
    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    byte: int | None = None
    reason: str = ""


CASES = {
    "weight": Case(
        *(33, "update", "network.conv2.weight", "the step of sgd", "memory"),
        fault=faults.flip_weight(33, "network.conv2.weight", 5, 3),
        reason="a bit was flipped",
    ),
    "momentum": Case(
        *(12, "update", "network.fc2.bias.momentum_buffer", "the step of sgd", "memory"),
        fault=faults.flip_momentum(12, "network.fc2.bias", 7, 20),
    ),
    "order": Case(
        *(25, "batch", "images", "the loader", "image order"),
        fault=faults.swap_images(1, 44, 77),
        reason="1 of 10 images are others, with 0 other labels",
    ),
    "pixel": Case(
        *(STEP_OF_IMAGE, "batch", "images", "the loader", "data"),
        byte=100,
        reason=f"1 pixel values of 1 of 10 images differ, first of image {list(ORDER).index(IMAGE) % 10} of the batch",
    ),
    "label": Case(*(STEP_OF_IMAGE, "batch", "labels", "the loader", "data"), byte=0, reason="1 of 10 labels are not"),
    "shards": Case(
        *(1, "gradient", "network.fc3.bias", "the sum over 2 shards", "reduction order"),
        settings={"shards": 2},
        reason="--shards is 1 and 2",
    ),
    "library": Case(
        *(1, "forward", "network.conv1", "aten.convolution.default", "library"),
        settings={"engine": "eager"},
        reason="--engine is compiled and eager",
    ),
    "rate": Case(
        *(29, "batch", "learning rate", "the schedule", "learning rate"),
        fault=faults.change_rate(29),
        reason="nothing that the records have explains it",
    ),
    "augmentation": Case(
        *(1, "batch", "images", "the loader", "setting"),
        settings={"flip": "random"},
        reason="--flip is none and random; the labels are equal, and ",
    ),
    "start": Case(
        *(1, "state before", "network.fc3.bias", "the weights that training starts from", "initialisation"),
        fault=faults.change_start("network.fc3.bias"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found_at_its_step_in_its_operator(name: str, sound: Path, dataset: Path, tmp_path: Path) -> None:
    case = CASES[name]
    if name == "library" and read_record(sound)["settings"]["engine"] != "compiled":
        pytest.skip("there are no kernels for this processor")
    if case.byte is not None:
        dataset = Path(shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".snapshots")))
        part = next(dataset.rglob("data_batch_1.bin"))
        content = bytearray(part.read_bytes())
        content[IMAGE * 3073 + case.byte] ^= 1
        part.write_bytes(content)
    with lasting("b", case.fault) if case.fault else nullcontext():
        other = train(tmp_path, dataset, "b", **case.settings)
        finding = find(sound, other)
    assert (finding.verdict, finding.step, finding.equal_step, finding.is_exact) == (
        "DIFFERENT", case.step, case.step - 1, True,
    )  # fmt: skip
    assert finding.result is not None and finding.cause is not None and finding.values is not None
    assert (finding.result.phase, finding.result.layer) == (case.phase, case.layer)
    assert case.operator in finding.result.operator
    assert (finding.cause.kind, case.reason in finding.cause.reason) == (case.kind, True), finding.cause
    assert finding.values.num_different >= 1 and finding.values.first != finding.values.second
    assert not any("is not as recorded" in line for line in finding.replays)


def test_a_flipped_bit_that_does_not_come_again_is_found_by_its_digest_alone(
    sound: Path, dataset: Path, tmp_path: Path
) -> None:
    with transient(faults.flip_weight(17, "network.conv1.weight", 100, 13)):
        other = train(tmp_path, dataset, "b", digest_every=1)
    finding = find(sound, other)
    assert (finding.step, finding.is_exact, finding.tensors) == (17, True, ("network.conv1.weight",))
    assert finding.result is None and finding.values is not None and finding.cause is not None
    assert (finding.values.bit, finding.values.num_different, finding.values.ulps) == (13, 1, 1 << 13)
    assert np.ravel_multi_index(finding.values.index, (6, 3, 5, 5)) == 100
    assert finding.cause.kind == "memory"
    assert finding.replays == (
        "A, trained again here, is as recorded at step 20",
        "B, trained again here, is not as recorded at step 17",
    )
    assert "8,192 ULP apart; bit 13 of this value alone differs" in " ".join(format_finding(finding).split())


def test_values_come_from_a_checkpoint_where_there_is_one(sound: Path, flipped: Path) -> None:
    finding = find(sound, flipped)
    assert (finding.step, finding.equal_step, finding.is_exact) == (20, 10, False)
    assert finding.tensors == ("network.fc1.weight",) and finding.values is not None
    assert (finding.values.bit, finding.values.index) == (22, (1, 377))
    assert finding.cause is not None and finding.cause.kind == "memory"


def test_a_run_is_held_against_this_machine(sound: Path, flipped: Path, capsys: Capture) -> None:
    assert main([str(sound), "--num_threads", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "SAME"
    before = {path: path.read_bytes() for path in flipped.rglob("*") if path.is_file()}
    assert main([str(flipped), "--num_threads", "1", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["equal_step"], found["step"]) == ("DIFFERENT", 10, 20)
    assert found["runs"] == [str(flipped), "this machine"]
    assert (found["tensors"], found["values"]["bit"]) == (["network.fc1.weight"], 22)
    assert found["cause"]["kind"] == "memory" and len(found["segments"]) == 1
    assert {path: path.read_bytes() for path in flipped.rglob("*") if path.is_file()} == before


def add_line(lines: list[dict[str, Any]]) -> None:
    lines.append({**lines[-1], "step": 50})


def forge_digest(lines: list[dict[str, Any]]) -> None:
    lines[-1]["digest"] = "0" * 64


FORGED: dict[str, tuple[Callable[[list[dict[str, Any]]], None], int | None, str]] = {
    "a line too many": (add_line, 41, "the chain of this machine ends after step 40; the other goes on"),
    "another digest": (forge_digest, None, "the difference is in digests.jsonl: its digests do not match these states"),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_chain_is_not_the_same(how: str, sound: Path, tmp_path: Path) -> None:
    forge, step, reason = FORGED[how]
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    lines = [json.loads(line) for line in (copy / "digests.jsonl").read_text().splitlines()]
    forge(lines)
    (copy / "digests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reseal(copy)
    for runs in ((copy,), (sound, copy)):
        finding = find(*runs)
        assert (finding.verdict, finding.equal_step, finding.step) == ("DIFFERENT", 40, step)
        expected = reason.replace("this machine", "A") if len(runs) == 2 else reason
        assert any(expected in line for line in finding.replays), finding.replays


def test_a_forged_checkpoint_is_not_gone_on_from(sound: Path, dataset: Path, tmp_path: Path) -> None:
    with lasting("b", faults.change_rate(29)):
        other = train(tmp_path, dataset, "b")
        for place, run in (("10", sound), ("20", other)):
            copy = Path(shutil.copytree(run, tmp_path / place))
            shutil.rmtree(copy / "checkpoints" / "step-00000020")
            shutil.copytree(sound / "checkpoints" / "step-00000010", copy / "checkpoints" / "step-00000020")
            reseal(copy)
        finding = find(tmp_path / "10", tmp_path / "20")
    assert (finding.verdict, finding.equal_step, finding.step, finding.is_exact) == ("DIFFERENT", 20, 30, False)
    for name in ("A", "B"):
        assert any(line.startswith(f"{name} cannot be trained again here: the checkpoint") for line in finding.replays)


@pytest.mark.usefixtures("without_kernels")
def test_what_this_machine_lacks_is_named_as_the_cause(sound: Path, tmp_path: Path) -> None:
    if read_record(sound)["settings"]["engine"] != "compiled":
        pytest.skip("there are no kernels for this processor")
    finding = find(sound)
    assert (finding.verdict, finding.equal_step, finding.step) == ("DIFFERENT", 0, 10)
    assert finding.cause is not None and finding.cause.kind == "library"
    assert finding.cause.reason.startswith("engine eager instead of compiled: ")
    assert finding.values is not None and finding.values.ulps is not None  # of the run's checkpoint of step 10
    assert any(line.startswith("A was trained again with a change: engine: ") for line in finding.replays)


def test_runs_that_agree_are_the_same(sound: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(sound, tmp_path / "copy")
    assert main([str(sound), str(copy)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "SAME",
        f"  A     {sound}",
        f"  B     {copy}",
        "  step  none of 40: all digests that both have are equal, and so are weights and probabilities",
    ]


def test_a_run_that_cannot_be_trained_again_is_judged_by_its_record(
    sound: Path, dataset: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".snapshots")))
    other = train(tmp_path, data, "b", momentum=0.8)
    shutil.rmtree(data)
    assert main([str(sound), str(other), "--num_threads", "1"]) == 3
    words = " ".join(capsys.readouterr().out.split())
    assert "step one of 1 to 10 of 40: the records have no digest between" in words
    assert "cause setting: --momentum is 0.9 and 0.8 differs --momentum" in words
    assert "replay B cannot be trained again here: " in words


def test_a_tensor_that_only_one_run_has_is_found(sound: Path, dataset: Path, tmp_path: Path) -> None:
    finding = find(sound, train(tmp_path, dataset, "b", ema_decay=0.9))
    assert (finding.step, finding.is_exact, finding.result) == (1, True, None)
    assert finding.tensors and all(name.startswith("average.") for name in finding.tensors)
    assert finding.cause is not None and finding.cause.reason == "--ema_decay is 0.0 and 0.9"


def test_the_shorter_of_two_runs_ends_before_they_part(sound: Path, dataset: Path, tmp_path: Path) -> None:
    shorter = train(tmp_path, dataset, "b", num_epochs=1)
    finding = find(sound, shorter)
    assert (finding.verdict, finding.equal_step, finding.step, finding.segments) == ("DIFFERENT", 20, 21, ())
    assert finding.cause is not None and finding.cause.reason.startswith("--num_epochs is 2 and 1")


BAD_LINES = {
    "RUN RUN": "RUN is named twice",
    "RUN RUN RUN": "bisect takes one run, or two, got: 3",
    "nothing": "there is no run folder",
    "RUN CHANGED": "CHANGED was changed after the run: model.pth is not what the manifest says",
    "UNFINISHED": "UNFINISHED is not a finished run",
    "RUN --dataset_folder nowhere": "nowhere",
    "RUN --segment 1:2": "--segment",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_what_cannot_be_is_refused_in_one_line(line: str, sound: Path, tmp_path: Path, capsys: Capture) -> None:
    names = {"RUN": sound, "CHANGED": tmp_path / "changed", "UNFINISHED": tmp_path / "unfinished"}
    for name in ("CHANGED", "UNFINISHED"):
        if name in line:
            shutil.copytree(sound, names[name])
    if "CHANGED" in line:
        (names["CHANGED"] / "model.pth").write_bytes(b"changed")
    if "UNFINISHED" in line:
        (names["UNFINISHED"] / "manifest.json").unlink()
    assert main([str(names.get(word, word)) for word in line.split()]) == 2
    (answer,) = capsys.readouterr().err.splitlines()[-1:]
    expected = BAD_LINES[line]
    for name, path in names.items():
        expected = expected.replace(name, str(path))
    assert answer.startswith("error: ") and expected in answer


def test_each_run_is_trained_again_under_its_own_cap(sound: Path, dataset: Path, tmp_path: Path) -> None:
    if get_instruction_set() in ("default", "avx2", "neon"):
        pytest.skip("this processor has nothing above AVX2 to cap")
    capped = f"--experiments_folder {tmp_path} --experiment_name e --run_name avx2 --instruction_set avx2 "
    capped += f"--dataset_folder {dataset} --num_threads 1 --engine eager --digest_every 1 --num_epochs 1 --recipe "
    capped += "notebook --batch_size 10 --learning_rate 0.01"
    run_command("image_classifier.main", *capped.split())
    other = train(tmp_path, dataset, "b", engine="eager", num_epochs=1, digest_every=1)
    finding = find(other, tmp_path / "e" / "avx2")
    assert (finding.verdict, finding.step) == ("DIFFERENT", 1)
    assert finding.cause is not None and finding.cause.kind == "instruction set"
    assert finding.result is not None and finding.result.phase in ("forward", "backward", "gradient")
    assert finding.values is not None and finding.values.ulps is not None
    assert {name for name, _, _ in finding.segments} == {"A", "B"} and len(finding.segments) == 2
    assert all(" is as recorded at step 1" in line for line in finding.replays), finding.replays
