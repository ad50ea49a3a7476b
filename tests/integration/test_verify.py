"""Verdicts: what is equal is called equal, and every difference that was put in is found and named."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from image_classifier.cli.verify import main
from image_classifier.errors import RunError, SettingsError
from image_classifier.experiment import run
from image_classifier.tracking import checkpoint
from image_classifier.tracking.checkpoint import load_model, serialize_model
from image_classifier.tracking.reading import read_manifest, read_record
from image_classifier.verification import Verdict, Verification, VerificationSettings, verify
from tests.conftest import PROJECT, require_real_data
from tests.runs import reseal
from tests.tiny import make_settings, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    settings = make_settings(tmp_path_factory.mktemp("e"), dataset, checkpoint_every="10steps", keep_checkpoints=9)
    return run(settings).folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(recorded, tmp_path / "e" / "tiny" / "run"))


def change_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = read_record(folder)
    change(record)
    (folder / "run.json").write_text(json.dumps(record))
    reseal(folder)


def verify_folder(folder: Path, **values: Any) -> Verification:
    return verify(VerificationSettings(run_folder=folder, num_workers=0, **values))


def test_a_run_is_identical_to_itself_trained_again(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}
    assert main([str(recorded)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "IDENTICAL",
        "  4 digests of the whole state and the final weights are equal",
    ]
    assert {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()} == before


def test_a_moved_run_is_verified_with_its_moved_data(copy: Path, dataset: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(dataset, moved, ignore=shutil.ignore_patterns(".snapshots"))
    assert verify_folder(copy, dataset_folder=moved).verdict is Verdict.IDENTICAL


def test_a_segment_alone_is_verified(recorded: Path) -> None:
    verification = verify_folder(recorded, segment="20:40")
    assert verification == Verification(
        Verdict.IDENTICAL, ("2 digests of the whole state from step 20 to step 40 are equal",)
    )
    assert verify_folder(recorded, segment="0:10").verdict is Verdict.IDENTICAL


@pytest.mark.parametrize("segment", ["", "1", "a:b", "40:20", "5:5", "-1:5"])
def test_a_segment_that_is_none_is_refused(segment: str, recorded: Path) -> None:
    with pytest.raises(SettingsError, match="--segment takes two steps"):
        VerificationSettings(run_folder=recorded, segment=segment)


def test_a_segment_without_a_checkpoint_or_a_digest_is_refused(recorded: Path) -> None:
    with pytest.raises(SettingsError, match="has checkpoints of the steps 0, 10, 20, 30, 40, not of 15"):
        verify_folder(recorded, segment="15:40")
    with pytest.raises(SettingsError, match="recorded no digest between"):
        verify_folder(recorded, segment="10:15")


def test_what_was_not_checked_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.html").write_text("<html>")
    (copy / "profile").symlink_to("/etc")
    assert main([str(copy), "--files_only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "INTACT"
    assert lines[2:] == ["  not checked, because no manifest lists it: profile, which is a symbolic link; report.html"]
    assert verify_folder(copy).reasons[1:] == (lines[2].strip(),)


def test_one_flipped_bit_in_a_file_is_found_and_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((copy / "model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.pth").write_bytes(content)
    for options in ([], ["--files_only"]):
        assert main([str(copy), *options]) == 3
        assert capsys.readouterr().out == "DIFFERENT\n  model.pth is not what the manifest says\n"


def test_one_flipped_bit_in_a_weight_under_a_forged_manifest_is_found_and_measured(copy: Path) -> None:
    model = load_model(copy / "model.pth")
    weight = model.classifier.get_parameter("network.fc2.weight").detach()
    value = float(weight[3, 4])
    weight.view(torch.int32)[3, 4] ^= 1
    difference = abs(float(weight[3, 4]) - value)
    (copy / "model.pth").write_bytes(serialize_model(model))
    reseal(copy)
    verification = verify_folder(copy)
    assert verification.verdict is Verdict.DIFFERENT
    (reason,) = verification.reasons
    assert reason == f"1 of 12 tensors of model.pth differ, most of all network.fc2.weight, by up to {difference:.3g}"


def test_one_changed_setting_is_found_at_its_first_step(copy: Path) -> None:
    change_record(copy, lambda record: record["settings"].update(momentum=0.8999))
    verification = verify_folder(copy)
    assert verification.verdict is Verdict.DIFFERENT
    assert verification.reasons[0].startswith("the first difference is at step 10: the first of ")
    assert "tensors is network.conv1.weight" in verification.reasons[0]
    assert (
        "of model.pth differ" in verification.reasons[1]
        and "probabilities of the test set differ" in verification.reasons[2]
    )


def test_one_changed_image_is_found(copy: Path, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other, ignore=shutil.ignore_patterns(".snapshots"))
    batch = next(other.rglob("data_batch_1.bin"))
    content = bytearray(batch.read_bytes())
    content[100] ^= 1
    batch.write_bytes(content)
    with pytest.raises(RunError, match="different data: its digest was [0-9a-f]{12}, is [0-9a-f]{12}"):
        verify_folder(copy, dataset_folder=other)


def test_a_forged_digest_in_the_chain_is_found(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "digests.jsonl").read_text().splitlines()]
    lines[2]["digest"] = "0" * 64
    (copy / "digests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reseal(copy)
    assert verify_folder(copy) == Verification(
        Verdict.DIFFERENT, ("the first difference is at step 30: the chain before it differs",)
    )


def test_a_chain_with_a_line_too_many_is_found(copy: Path) -> None:
    chain = copy / "digests.jsonl"
    chain.write_text(chain.read_text() + json.dumps({"step": 50, "digest": "0" * 64, "tensors": {}}) + "\n")
    reseal(copy)
    assert verify_folder(copy).reasons == ("the record has digests of steps that the run did not reach",)


def test_other_code_is_refused_unless_it_is_allowed(copy: Path) -> None:
    change_record(copy, lambda record: record["code"].update(digest="0" * 64))
    with pytest.raises(RunError, match="different code: .* --allow_code_change trains it nevertheless"):
        verify_folder(copy)
    assert verify_folder(copy, allow_code_change=True).verdict is Verdict.IDENTICAL


def test_other_libraries_are_refused_by_name_unless_they_are_allowed(copy: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["environment"]["distributions"]["torch"] = "1.0"
        record["environment"]["digest"] = "0" * 64

    change_record(copy, change)
    with pytest.raises(RunError, match="different environment: torch was 1.0, is .*--allow_environment_change"):
        verify_folder(copy)
    assert verify_folder(copy, allow_environment_change=True).verdict is Verdict.IDENTICAL


def test_a_machine_of_another_class_is_not_comparable(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(record: dict[str, Any]) -> None:
        record["machine"]["class"]["processor"] = "Zilog Z80"
        record["machine"]["digest"] = "0" * 64

    change_record(copy, change)
    assert main([str(copy)]) == 4
    answer = capsys.readouterr().out
    assert answer.startswith("NOT COMPARABLE\n  processor was Zilog Z80, is ") and "--anyway trains" in answer
    assert verify_folder(copy, anyway=True).verdict is Verdict.IDENTICAL


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the record asks for")
def test_a_run_of_a_gpu_is_not_comparable_without_one(copy: Path) -> None:
    change_record(copy, lambda record: record["settings"].update(device="cuda"))
    verification = verify_folder(copy)
    assert verification.verdict is Verdict.NOT_COMPARABLE and "torch sees no GPU here" in verification.reasons[0]


LACKS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a GPU": ({"device": "cuda"}, {"device": "cpu"}),
    "names": (
        {"device": "mps", "precision": "fp16", "engine": "inductor", "instruction_set": "avx10"},
        {"device": "cpu", "precision": "fp32", "engine": "eager", "instruction_set": "native"},
    ),
    "kernels": ({"engine": "compiled"}, {"engine": "eager"}),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_this_machine_lacks_is_named_and_replaced_by_the_nearest_if_anyway(
    lack: str, copy: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded, nearest = LACKS[lack]
    if lack == "a GPU" and torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the record asks for")
    if lack == "kernels":
        request.getfixturevalue("without_kernels")
    change_record(copy, lambda record: record["settings"].update(recorded))
    assert main([str(copy)]) == 4
    answer = capsys.readouterr().out.splitlines()
    assert (
        answer[0] == "NOT COMPARABLE" and answer[-1] == "  --anyway trains nevertheless, and measures the differences"
    )
    for setting, value in recorded.items():
        assert any(line.startswith(f"  {setting} was {value}: ") for line in answer)
    for options in ([], ["--segment", "20:40"]):
        status = main([str(copy), "--anyway", *options])
        verdict, *reasons = capsys.readouterr().out.splitlines()
        if nearest.get("engine") != "eager":  # then the same is computed
            assert (status, verdict) == (0, "IDENTICAL")
        else:
            assert (status, verdict) == (4, "NOT COMPARABLE")
            assert any("the first difference is at step" in line for line in reasons)
            assert any("of model.pth differ" in line for line in reasons) == (not options)
            assert "only a machine of the run's class can tell" in reasons[-1]
        for setting, value in nearest.items():
            assert any(line.startswith(f"  {setting} {value} instead of {recorded[setting]}: ") for line in reasons)


def test_a_segment_of_another_machine_is_identical_if_its_tensors_are(copy: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["machine"]["class"]["processor"] = "Zilog Z80"
        record["machine"]["digest"] = "0" * 64

    change_record(copy, change)
    for path in (copy / "checkpoints").glob("*/state.pth"):  # as on that machine
        state = torch.load(path, weights_only=True) | {"machine_digest": "0" * 64}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getvalue())
        (path.parent / "manifest.json").write_bytes(checkpoint._build_manifest(buffer.getvalue()))
    reseal(copy)
    verification = verify_folder(copy, segment="20:40", anyway=True)
    assert verification.verdict is Verdict.IDENTICAL, verification
    assert verification.reasons[1].startswith("processor was Zilog Z80, is ")


def test_another_torch_is_trained_with_anyway_and_named(copy: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["machine"]["class"]["torch"] = record["environment"]["distributions"]["torch"] = "1.0"
        record["machine"]["digest"] = record["environment"]["digest"] = "0" * 64

    change_record(copy, change)
    assert verify_folder(copy).verdict is Verdict.NOT_COMPARABLE
    verification = verify_folder(copy, anyway=True)
    assert verification.verdict is Verdict.IDENTICAL
    assert verification.reasons[1].startswith("torch was 1.0, is ")
    assert verification.reasons[2].startswith("different environment: torch was 1.0, is ")


@pytest.mark.parametrize(("setting", "value"), [("warp_factor", 9), ("model", "vgg"), ("shards", "two")])
def test_a_setting_that_this_version_does_not_know_is_refused_in_one_line(
    setting: str, value: Any, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_record(copy, lambda record: record["settings"].update({setting: value}))
    for options in ([], ["--anyway"]):
        assert main([str(copy), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the record has ") and setting in line or "'str'" in line


def test_an_unfinished_run_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "manifest.json").unlink()
    for options in ([], ["--files_only"]):
        assert main([str(copy), *options]) == 2
        assert "is not a finished run" in capsys.readouterr().err


def test_a_pretrained_model_that_moved_is_found_again(recorded: Path, dataset: Path, tmp_path: Path) -> None:
    experiments = tmp_path / "experiments"
    shutil.copytree(recorded, experiments / "tiny" / "first")
    settings = make_settings(
        experiments, dataset, "second", num_epochs=1, pretrained_model=Path("tiny/first/model.pth")
    )
    folder = run(settings).folder
    moved = experiments.rename(tmp_path / "moved")
    verification = verify_folder(moved / "tiny" / folder.name, experiments_folder=moved)
    assert verification.verdict is Verdict.IDENTICAL


def train_in_a_process(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "image_classifier.main", "--experiments_folder", str(folder), *options]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, timeout=300)


def verify_in_a_process(folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "image_classifier", "verify", str(folder), *options]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def test_two_runs_under_a_cap_share_a_class_and_their_bits(dataset: Path, tmp_path: Path) -> None:
    options = (
        f"--experiment_name e --recipe notebook --batch_size 10 --dataset_folder {dataset} --num_threads 1".split()
    )
    for name in ("first", "second"):
        train_in_a_process(tmp_path, *options, "--run_name", name, "--instruction_set", "avx2")
    first, second = (tmp_path / "e" / name for name in ("first", "second"))
    machine = read_record(first)["machine"]
    assert machine["class"]["processor"] == "any" and machine["class"]["instruction_set"] == "avx2"
    assert read_record(second)["machine"] == machine
    assert read_manifest(first)["weights_digest"] == read_manifest(second)["weights_digest"]
    assert verify_in_a_process(first)[0] == 0


@pytest.mark.parametrize("recipe", ["notebook", "fast"])
def test_a_recipe_shortened_is_identical_on_real_data(recipe: str, tmp_path: Path) -> None:
    data = require_real_data("IMAGE_CLASSIFIER_CIFAR10_ORIGINAL")
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns(".snapshots"))
    options = (
        f"--experiment_name e --run_name r --recipe {recipe} --num_epochs 1 --digest_every 5 --dataset_folder {folder}"
    )
    batch = ["--batch_size", "50"] if recipe == "notebook" else []
    train_in_a_process(tmp_path, *options.split(), *batch)
    status, answer = verify_in_a_process(tmp_path / "e" / "r")
    assert (status, "IDENTICAL" in answer) == (0, True), answer
