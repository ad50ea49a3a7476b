"""Verdicts from a training to the gates, by the commands: signed, counted, asked for, and audits of a part."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.attestation import find_export
from image_classifier.choices import NumKept
from image_classifier.cli import attest as attest_command
from image_classifier.cli.registry import main as registry
from image_classifier.cli.serve import main as serve
from image_classifier.cli.verify import main
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import ModelError, SettingsError
from image_classifier.experiment import run
from image_classifier.published.attestation import EXPORT, serialize_statement
from image_classifier.published.folder import ATTESTATIONS, MODEL, describe_content, serialize_manifest
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from image_classifier.tracking import checkpoint
from image_classifier.tracking.checkpoint import Checkpoints
from image_classifier.tracking.identity import compute_json_digest
from image_classifier.tracking.reading import read_manifest
from image_classifier.tracking.run import RunFolder
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.attestations import put, sign, state, write_policy
from tests.conftest import find_port
from tests.published import write_keys, write_published
from tests.runs import write_run
from tests.tiny import make_settings, write_tiny_dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps with all of its four checkpoints."""
    dataset = write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")
    experiments = tmp_path_factory.mktemp("e")
    kept: NumKept = "all"
    return run(make_settings(experiments, dataset, checkpoint_every="10steps", keep_checkpoints=kept)).folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "e" / "tiny" / "run"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_keys(folder, name, ec.SECP256R1()) for name in ("lab", "build")}


def test_a_verdict_is_signed_and_counted(copy: Path, keys: dict[str, tuple[Path, Path]], capsys: Capture) -> None:
    public = [str(key) for _, key in keys.values()]
    for name, (private, _) in keys.items():
        segment = [] if name == "lab" else ["--segment", "20:40"]
        assert main([str(copy), "--attest", "--sign_key", str(private), *segment]) == 0
        assert "  signed: " in capsys.readouterr().out
    assert main([str(copy), "--threshold", "1-of-2", "--public_key", *public]) == 0
    verdict, *lines = capsys.readouterr().out.splitlines()
    assert (verdict, lines[0]) == ("ACCEPTED", "  found IDENTICAL by 1 of 2 verifiers; needed: 1")
    assert f"{public[0]}: IDENTICAL, all 40 steps, on " in lines[1] and lines[2] == f"  missing: {public[1]}"
    assert lines[3].endswith("its kind is segment, but the policy accepts all")
    assert main([str(copy), "--threshold", "2-of-2", "--public_key", *public]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "1 of 2 verdicts; missing: " in line
    assert main([str(copy), "--files_only"]) == 0  # they are no part of what the manifest names
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  not checked here: 2 files in attestations/; `verify --policy` counts verdicts"


def test_a_difference_is_signed_and_closes_every_gate(
    copy: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    put(copy, sign(state(copy), keys["build"][0]))
    policy = write_policy(tmp_path / "policy.yaml", {name: key for name, (_, key) in keys.items()}, threshold=1)
    assert main([str(copy), "--policy", str(policy)]) == 0
    lines = (copy / "digests.jsonl").read_text().splitlines()
    changed = json.loads(lines[2]) | {"digest": "0" * 64}
    (copy / "digests.jsonl").write_text("\n".join([*lines[:2], json.dumps(changed), lines[3]]) + "\n")
    assert main([str(copy), "--attest", "--sign_key", str(keys["lab"][0])]) == 2  # a copy that was changed
    assert "was not trained again" in capsys.readouterr().err
    manifest = read_manifest(copy)
    (copy / "manifest.json").unlink()
    RunFolder(copy).finish(weights_digest=manifest["weights_digest"], chain_head=manifest["chain_head"])
    (copy / "published").mkdir()
    (copy / "published" / MODEL).write_bytes(b"a network")
    published = {"format_version": 1, "experiment_name": "tiny", "run_name": "run", "data_digest": "", "classes": []}
    published |= {
        "run_manifest_digest": read_manifest(copy)["digest"],
        "files": {MODEL: describe_content(b"a network")},
    }
    (copy / "published" / "manifest.json").write_bytes(serialize_manifest(published))
    assert main([str(copy), "--attest", "--sign_key", str(keys["lab"][0])]) == 3
    assert "signed: " in capsys.readouterr().out
    assert main([str(copy / "published"), "--policy", str(policy)]) == 3
    assert "lab: DIFFERENT, " in capsys.readouterr().err
    put(copy, sign(state(copy), keys["build"][0]))
    assert main([str(copy), "--policy", str(policy)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "the verdicts contradict each other: lab: DIFFERENT, the first difference is at step 30" in line
    assert "; build: IDENTICAL, " in line


def test_a_verdict_of_one_machine_is_signed_on_another(
    copy: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    private, public = (str(key) for key in keys["lab"])
    statement = tmp_path / "statement.json"
    assert main([str(copy), "--segment", "20:40", "--statement", str(statement)]) == 0
    assert f"  not signed yet: {statement}" in capsys.readouterr().out
    assert not (copy / "attestations").exists()
    assert main([str(copy), "--statement", str(statement)]) == 2
    assert capsys.readouterr().err == f"error: --statement takes a new file, and {statement} is there already\n"
    assert attest_command.main([str(copy), str(statement), "--sign_key", private]) == 0
    policy = write_policy(tmp_path / "policy.yaml", {"lab": Path(public)}, kinds=["segment"])
    assert main([str(copy), "--policy", str(policy)]) == 0
    assert "lab: IDENTICAL, the chosen segment 20:40 of 40 steps" in capsys.readouterr().out


BAD_STATEMENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another run": (lambda s: s["predicate"]["run"].update(run_name="other"), "the statement is about another run"),
    "of other weights": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "about another run"),
    "of a model that nobody published": (
        lambda s: s["subject"].append({"name": EXPORT, "digest": {"sha256": "0" * 64}}),
        "has no published model",
    ),
    "of another kind": (lambda s: s.update(predicateType="x"), "cannot be used: it is not a verdict of this package"),
    "of a later version": (lambda s: s["predicate"].update(format_version=2), "cannot be used: it has the format 2"),
}


@pytest.mark.parametrize("kind", BAD_STATEMENTS)
def test_a_statement_about_something_else_is_not_signed(
    kind: str, copy: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    change, reason = BAD_STATEMENTS[kind]
    statement = state(copy)
    change(statement)
    path = tmp_path / "statement.json"
    path.write_bytes(serialize_statement(statement))
    assert attest_command.main([str(copy), str(path), "--sign_key", str(keys["lab"][0])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert not (copy / "attestations").exists()


def test_a_statement_in_another_form_or_about_changed_files_is_not_signed(
    copy: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "statement.json"
    words = [str(copy), str(path), "--sign_key", str(keys["lab"][0])]
    assert attest_command.main(words) == 2
    assert f"error: the statement {path} cannot be read: No such file" in capsys.readouterr().err
    path.write_bytes(b" " + serialize_statement(state(copy)))
    assert attest_command.main(words) == 2
    assert "its encoding is not canonical" in capsys.readouterr().err
    path.write_bytes(serialize_statement(state(copy)))
    with (copy / "model.pth").open("ab") as weights:
        weights.write(b"x")
    assert attest_command.main(words) == 2
    assert "its files do not match its manifest" in capsys.readouterr().err
    assert not (copy / "attestations").exists()


BAD_LINES = {
    "--attest": "--attest and --sign_key are needed together",
    "--sign_key KEY": "--attest and --sign_key are needed together",
    "--attest --sign_key none": "--sign_key none cannot be read",
    "--attest --sign_key keyless": "there is no identity to sign with",
    "--attest --sign_key KEY --files_only": "--files_only trains nothing",
    "--statement new.json --files_only": "--files_only trains nothing",
    "--statement none/new.json": "lies in no folder",
    "--threshold 1-of-1 --public_key PUBLIC --statement new.json": "--statement is for a verification that trains",
    "--threshold 3-of-2 --public_key PUBLIC": "K-of-N, such as 2-of-3",
    "--threshold 2-of-3": "--public_key of each of N verifiers",
    "--public_key PUBLIC": "--public_key of each of N verifiers",
    "--threshold 1-of-2 --public_key PUBLIC": "is of 2 verifiers, and 1 are named",
    "--threshold 3-of-3 --public_key PUBLIC": "--threshold 3-of-3 is of 3 verifiers, and 1 are named",
    "--threshold 1-of-1 --public_key PUBLIC --sample 2": "--sample is for a verification that trains",
    "--threshold 1-of-1 --public_key PUBLIC --attest": "--attest is for a verification that trains",
    "--policy none": "--policy none cannot be read: No such file",
    "--sample 0": "--sample takes a whole number of 1 or more",
    "--sample 5": "has 4 segments between checkpoints with digests in the chain; take fewer",
    "--sample 1 --segment 10:20": "--segment and --sample contradict",
    "--nonce a": "--nonce needs --sample",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_what_cannot_be_is_refused_in_one_line(
    line: str, recorded: Path, keys: dict[str, tuple[Path, Path]], capsys: Capture
) -> None:
    words = line.replace("PUBLIC", str(keys["lab"][1])).replace("KEY", str(keys["lab"][0])).split()
    assert main([str(recorded), *words]) == 2
    (answer,) = capsys.readouterr().err.splitlines()
    assert BAD_LINES[line] in answer
    assert not (recorded / ATTESTATIONS).exists()


def test_a_sample_is_trained_and_signed_as_one(
    copy: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: Capture
) -> None:
    words = ["--sample", "2", "--nonce", "a", "--attest", "--sign_key", str(keys["lab"][0])]
    assert main([str(copy), *words]) == 0
    verdict, *lines = capsys.readouterr().out.splitlines()
    assert verdict == "IDENTICAL" and lines[0].startswith("  2 digests of the whole state from step ")
    assert lines[1] == "  2 of 4 segments were drawn from the manifest's digest and the nonce a"
    assert lines[2].endswith("of 1 with probability 50.0%, 2 with probability 83.3%")
    public = {"lab": keys["lab"][1]}
    assert main([str(copy), "--policy", str(write_policy(tmp_path / "all", public))]) == 2
    assert "its kind is sample, but the policy accepts all" in capsys.readouterr().err
    assert main([str(copy), "--policy", str(write_policy(tmp_path / "sample", public, kinds=["sample"]))]) == 0
    assert "lab: IDENTICAL, drawn segments " in capsys.readouterr().out


def reseal(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    RunFolder(folder).finish(weights_digest=manifest["weights_digest"], chain_head=manifest["chain_head"])


def forge_checkpoint(folder: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint so that it looks whole."""
    path = Checkpoints(folder / "checkpoints").get_path(step) / "state.pth"
    content = torch.load(path, weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())
    (path.parent / "manifest.json").write_bytes(checkpoint._build_manifest(buffer.getvalue()))


def double_rates(content: dict[str, Any]) -> None:
    for group in content["optimizer"]["param_groups"]:
        group["initial_lr"] *= 2


def change_weight(content: dict[str, Any]) -> None:
    content["classifier"]["network.fc2.bias"][0] += 1


def audit(folder: Path, number: int = 4) -> tuple[Verdict, str]:
    verification = verify(VerificationSettings(run_folder=folder, num_workers=0, sample=number))
    return verification.verdict, verification.reasons[0]


def test_a_checkpoint_that_is_not_the_state_of_the_chain_is_found(copy: Path) -> None:
    forge_checkpoint(copy, 20, change_weight)
    reseal(copy)
    verdict, reason = audit(copy)
    assert verdict is Verdict.DIFFERENT and "the checkpoint of step 20 does not match the digest chain" in reason


def test_learning_rates_are_those_of_the_settings_and_not_of_a_checkpoint(copy: Path) -> None:
    for step in (10, 20, 30):
        forge_checkpoint(copy, step, double_rates)
    reseal(copy)
    assert audit(copy)[0] is Verdict.IDENTICAL


def test_segments_that_do_not_join_are_found(copy: Path) -> None:
    """Somebody exchanges the weights after step 20 and goes on from those: each segment for itself can be trained."""
    lines = [json.loads(line) for line in (copy / "digests.jsonl").read_text().splitlines()]
    joined = {**lines[1], "digest": compute_json_digest([lines[0]["digest"], 20, {"forged": "0" * 64}])}
    text = "".join(json.dumps(line) + "\n" for line in (*lines[:2], joined, *lines[2:]))
    (copy / "digests.jsonl").write_text(text)
    reseal(copy)
    assert main([str(copy), "--sample", "1"]) == 2


def test_final_weights_of_another_training_are_found_by_any_sample(copy: Path, tmp_path: Path) -> None:
    model = checkpoint.load_model(copy / "model.pth")
    with torch.no_grad():
        model.classifier.get_parameter("network.fc2.bias")[0] += 1
    (copy / "model.pth").write_bytes(checkpoint.serialize_model(model))
    reseal(copy)
    verdict, reason = audit(copy, 1)
    assert verdict is Verdict.DIFFERENT and "1 of 12 tensors of model.pth differ" in reason


def test_a_run_that_ended_before_its_last_step_is_found_by_any_sample(copy: Path) -> None:
    lines = (copy / "digests.jsonl").read_text().splitlines(keepends=True)
    (copy / "digests.jsonl").write_text("".join(lines[:3]))
    shutil.rmtree(copy / "checkpoints" / "step-00000040")
    reseal(copy)
    verdict, reason = audit(copy, 1)
    assert verdict is Verdict.DIFFERENT and "the first difference is at step 40" in reason


def test_runs_that_a_sample_says_too_little_of_are_refused(copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    for name, value in (("keep", "best"), ("early_stopping", 3)):
        settings = {**record["settings"], name: value}
        (copy / "run.json").write_text(json.dumps({**record, "settings": settings}))
        reseal(copy)
        with pytest.raises(SettingsError, match="cannot check which epoch was the best"):
            audit(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(SettingsError, match="has none of its last step 40"):
        audit(copy)


def test_a_verdict_names_the_published_bytes_if_exporting_the_weights_gives_them(
    published_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(published_run.parent, tmp_path / "run")
    content = (published_run / MODEL).read_bytes()
    said: list[str] = []
    assert find_export(run, said.append) == hashlib.sha256(content).hexdigest() and not said
    manifest = json.loads((run / "published" / "manifest.json").read_text())
    manifest["files"][MODEL] = describe_content(content + b"\x72\x00")
    (run / "published" / MODEL).write_bytes(content + b"\x72\x00")
    (run / "published" / "manifest.json").write_bytes(serialize_manifest(manifest))
    assert find_export(run, said.append) is None
    assert said == ["model.onnx is not attested: exporting the weights here gives other bytes"]


@dataclass
class Gate:
    """A published model of a run whose verdicts come one after the other, and the policy that asks for two."""

    run: Path
    published: Path
    policy: Path
    experiments: Path
    data: Path

    def attest(self, key: Path) -> None:
        """Add somebody's verdict of today."""
        statement = state(self.run, export=(self.published / MODEL).read_bytes())
        statement["predicate"]["verified_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        put(self.published, sign(statement, key))


@pytest.fixture
def gate(published_run: Path, sample_dataset: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path) -> Gate:
    folder = write_run(tmp_path / "experiments")
    changes = {"run_manifest_digest": read_manifest(folder)["digest"]}
    published = write_published(folder / "published", published_run, load_snapshot(sample_dataset), 50, **changes)
    policy = write_policy(tmp_path / "policy.yaml", {name: key for name, (_, key) in keys.items()})
    return Gate(folder, published, policy, tmp_path / "experiments", sample_dataset)


def test_a_model_outside_of_the_policy_is_refused_before_anything_listens(
    gate: Gate, keys: dict[str, tuple[Path, Path]], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    listened: list[int] = []
    monkeypatch.setattr(socket.socket, "listen", lambda self, backlog=0: listened.append(backlog))
    gate.attest(keys["lab"][0])
    port = str(find_port())
    for model in (gate.published, gate.published / MODEL):
        assert serve([str(model), "--policy", str(gate.policy), "--port", port]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.endswith("1 of 2 verdicts; missing: build")
    put(gate.published, sign(state(gate.run, verdict=Verdict.DIFFERENT), keys["build"][0]))
    assert serve([str(gate.published), "--policy", str(gate.policy), "--port", port]) == 3
    assert "contradict each other: build: DIFFERENT" in capsys.readouterr().err
    assert not listened


def test_a_model_that_takes_the_place_of_one_is_held_against_the_policy_too(
    gate: Gate, keys: dict[str, tuple[Path, Path]]
) -> None:
    for private, _ in keys.values():
        gate.attest(private)
    source = ModelSource(ServerSettings(model=str(gate.published), policy=gate.policy), None)
    assert source.load().model.run_name == "run"
    next((gate.published / ATTESTATIONS).iterdir()).unlink()
    os.utime(gate.published / "manifest.json", ns=(1, 1))
    with pytest.raises(ModelError, match="1 of 2 verdicts"):
        source.load_if_moved()


def test_only_what_meets_the_policy_is_promoted(
    gate: Gate, keys: dict[str, tuple[Path, Path]], capsys: Capture
) -> None:
    common = ["--experiments_folder", str(gate.experiments)]
    data = ["--dataset_folder", str(gate.data)]
    gate.attest(keys["lab"][0])
    assert registry(["add", str(gate.run), "--name", "one", *common, *data]) == 0
    gate.attest(keys["build"][0])
    assert registry(["add", str(gate.run), "--name", "two", *common, *data]) == 0
    capsys.readouterr()
    policy = ["--policy", str(gate.policy)]
    assert registry(["promote", "one/1", *policy, *common, *data]) == 2
    assert "1 of 2 verdicts; missing: build" in capsys.readouterr().err
    assert registry(["promote", "two/1", *policy, *common, *data]) == 0
    assert capsys.readouterr().out.startswith("two@champion is version 1")
