"""Verifies a recorded run: checks its files against the manifest, and trains it again to compare the digest chain."""

from __future__ import annotations

import json
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from image_classifier.access import DatabaseAccess
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import RunError, SettingsError
from image_classifier.experiment import run
from image_classifier.plugins import PLUGGABLE, check_allowed
from image_classifier.published.attestation import Kind
from image_classifier.references import get_published_weights, get_reference
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.storage import scratch_folder
from image_classifier.text import count
from image_classifier.tracking.audit import Audit, build_audit
from image_classifier.tracking.checking import describe_others, is_finished, verify_files
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.identity import (
    compute_json_digest,
    compute_tensor_digests,
    describe_machine,
    find_differing_keys,
)
from image_classifier.tracking.layout import CHAIN, CHECKPOINTS, METRICS, MODEL, RECORD
from image_classifier.tracking.reading import read_chain, read_manifest, read_predictions, read_record
from image_classifier.tracking.record import find_identity_changes
from image_classifier.training.determinism import (
    cap_instruction_set,
    resolve_nearest_settings,
    restore_nearest_settings,
)
from image_classifier.training.loop import Step


class Verdict(StrEnum):
    """Result of a verification."""

    IDENTICAL = "IDENTICAL"
    DIFFERENT = "DIFFERENT"
    NOT_COMPARABLE = "NOT COMPARABLE"


@dataclass(frozen=True)
class Checked:
    """Evidence for a verdict.

    Attributes:
        manifest: of the run, read before the training.
        record: of the run.
        again: record of the second training, with this machine's code, environment and hardware.
        kind: all steps, drawn segments, or one chosen segment.
        segments: first and last step of each segment; empty if all steps were trained again.
        num_steps: of the run.
        num_digests: number of equal digests.
        nonce: random value with which segments were drawn.
    """

    manifest: dict[str, Any]
    record: dict[str, Any]
    again: dict[str, Any]
    kind: Kind
    segments: tuple[tuple[int, int], ...]
    num_steps: int
    num_digests: int
    nonce: str | None = None


@dataclass(frozen=True)
class Verification:
    """A verdict and its reasons, one line each.

    Attributes:
        checked: evidence; None if nothing was trained.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    checked: Checked | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class VerificationSettings:
    """Which run to verify, how, and where its inputs are now.

    Attributes:
        run_folder: The run.
        dataset_folder: Its data set, if it moved; or db:NAME@VERSION.
        database_access: Access to the database, if the data set is in one.
        experiments_folder: Folder of its pretrained model, if it moved.
        segment: A:B trains only from the checkpoint of step A (0: the start) to step B.
        sample: Number of segments between checkpoints to draw and train again, instead of all.
        nonce: Random value for the drawing. Whoever trained the run must not know it in advance.
        anyway: Train although this machine is of another class, with the nearest available settings, and measure the
            differences.
        allow_code_change: Train although the package's code differs from the record.
        allow_environment_change: Train although the installed libraries differ from the record.
        num_threads: Threads that compute shards; 0 for one per available core.
        num_workers: Threads that prepare batches.
    """

    run_folder: Path
    dataset_folder: Path | None = None
    database_access: DatabaseAccess | None = None
    experiments_folder: Path | None = None
    segment: str | None = None
    sample: int | None = None
    nonce: str | None = None
    anyway: bool = False
    allow_code_change: bool = False
    allow_environment_change: bool = False
    num_threads: int = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        if self.segment is not None:
            begin, separator, end = self.segment.partition(":")
            if not separator or not begin.isdecimal() or not end.isdecimal() or int(begin) >= int(end):
                raise SettingsError(f"--segment takes two steps such as 100:200, got: {self.segment}")
        if self.segment is not None and self.sample is not None:
            raise SettingsError("--segment and --sample contradict each other; leave one of them out")
        if self.sample is not None and self.sample < 1:
            raise SettingsError(f"--sample takes a whole number of 1 or more, got: {self.sample}")
        if self.nonce is not None and self.sample is None:
            raise SettingsError("--nonce needs --sample; give both")

    @property
    def kind(self) -> Kind:
        """Kind of verification."""
        return "segment" if self.segment is not None else "sample" if self.sample is not None else "all"


def verify(settings: VerificationSettings, reporter: Reporter | None = None) -> Verification:
    """Train a recorded run again in a scratch folder, and compare it with the record.

    Raises:
        RunError: the run is not finished, or this machine has other code, data or libraries.
        ImageClassifierError: its data or pretrained model cannot be found.
        Interrupted: the reporter stopped it.
    """
    folder = settings.run_folder
    manifest = read_manifest(folder) if is_finished(folder) else {}
    changed = verify_files(folder)
    if changed:
        return Verification(Verdict.DIFFERENT, changed)
    record, chain = read_record(folder), read_chain(folder)
    for kind in PLUGGABLE:
        check_allowed(kind, record["settings"].get(kind, "sgd"), folder / RECORD, RunError)
    audit = None
    if settings.sample is not None:
        nonce = settings.nonce or secrets.token_hex(16)
        audit = build_audit(folder, manifest, record, chain, settings.sample, nonce)
    segments = audit.drawn if audit else parse_segment(settings.segment)
    training, lacks = restore_nearest_settings(record["settings"])
    cap_instruction_set(training.instruction_set)
    training, others = resolve_nearest_settings(training)
    lacks += others
    apart = _find_class_differences(record, chain, segments, training)
    apart = {name: line for name, line in apart.items() if name not in {lack.setting for lack in lacks}}
    if (lacks or apart) and not settings.anyway:
        reasons = (*map(str, lacks), *apart.values(), "--anyway trains nevertheless, and measures the differences")
        return Verification(Verdict.NOT_COMPARABLE, reasons)
    record["settings"] |= {lack.setting: lack.nearest for lack in lacks}
    machine = (*(lack.describe_replacement() for lack in lacks), *apart.values())
    if "torch" in apart:  # its version also belongs to the environment
        settings = replace(settings, allow_environment_change=True)

    witness = _Witness(record, chain, settings, reporter or Reporter(), goes_on=not machine)
    _train_again(settings, record, training, witness, segments, audit)
    last = max((line["step"] for line in chain), default=0)
    again, num_equal, drawn_with = witness.again, witness.num_equal, audit.nonce if audit else None
    checked = Checked(manifest, record, again, settings.kind, segments, last, num_equal, drawn_with)
    return _judge(witness, machine, checked, audit.describe() if audit else (), describe_others(folder))


def _judge(
    witness: _Witness, machine: tuple[str, ...], checked: Checked, chances: tuple[str, ...], others: tuple[str, ...]
) -> Verification:
    """Derive the verdict from the comparison.

    Args:
        machine: differences between this machine and the run's.
        chances: what a sample proves.
        others: files that no manifest covers.
    """
    allowed = (*machine, *witness.allowed)
    if witness.differences and machine:
        doubt = "the differences may come from this machine: only a machine of the run's class can tell"
        return Verification(Verdict.NOT_COMPARABLE, (*allowed, *witness.differences, doubt))
    if witness.differences:
        return Verification(Verdict.DIFFERENT, (*allowed, *witness.differences), checked)
    listed = ", ".join(f"from step {begin} to step {end}" for begin, end in checked.segments)
    digests = count(witness.num_equal, "digest")
    equal = f"{digests} of the whole state {listed or 'and the final weights'} are equal"
    return Verification(Verdict.IDENTICAL, (equal, *chances, *allowed, *others), checked)


def parse_segment(text: str | None) -> tuple[tuple[int, int], ...]:
    """Parse A:B, which `VerificationSettings` has validated; None means all steps."""
    begin, _, end = (text or "").partition(":")
    return ((int(begin), int(end)),) if text is not None else ()


def _train_again(
    settings: VerificationSettings,
    record: dict[str, Any],
    training: TrainingSettings,
    witness: _Witness,
    segments: tuple[tuple[int, int], ...],
    audit: Audit | None,
) -> None:
    """Train the run or its segments in a scratch folder, while the witness compares."""
    folder = settings.run_folder
    with scratch_folder() as scratch:
        again = build_run_settings(settings, record, training, scratch)
        snapshot = load_snapshot(again.dataset, again.database_access, again.reading)
        snapshot = snapshot.recognize(record["data"]["digest"])
        if not segments:
            result = run(again, snapshot=snapshot, reporter=witness)
            witness.differences += _compare_results(folder, result.folder)
            return
        for segment in segments:
            again = replace(again, experiments_folder=scratch / str(segment[0]), resume=True)
            witness.expect(segment)
            prepare_segment(folder, record, again.run_folder, segment[0])
            with suppress(_SegmentEnd):
                run(again, snapshot=snapshot, reporter=witness)
            shutil.rmtree(again.experiments_folder)
        if audit is not None:
            again = replace(again, experiments_folder=scratch / "end")
            witness.expect_end()
            prepare_segment(folder, record, again.run_folder, audit.last_step)
            result = run(again, snapshot=snapshot, reporter=witness)
            witness.differences += _compare_results(folder, result.folder)


def _find_class_differences(
    record: dict[str, Any],
    chain: list[dict[str, Any]],
    segments: tuple[tuple[int, int], ...],
    training: TrainingSettings,
) -> dict[str, str]:
    """Describe, by name, why this machine is not of the class that the run was trained in; empty if it is."""
    steps = [line["step"] for line in chain if "break" in line]
    breaks = [step for step in steps if not segments or any(begin <= step < end for begin, end in segments)]
    if breaks:
        after = f"the run continued on a machine of another class after step {breaks[0]}; --segment verifies a part"
        return {"break": after}
    recorded, present = record["machine"]["class"], describe_machine(training)["class"]
    if "shards" not in record["settings"]:
        before = f"the run is from a version without shards: {record['code']['version']} can verify it"
        return {"shards": f"{before} (commit {record['code']['commit'] or 'unknown'})"}
    return {
        name: f"{name} was {recorded.get(name)}, is {present.get(name)}"
        for name in find_differing_keys(recorded, present)
    }


def build_run_settings(
    settings: VerificationSettings, record: dict[str, Any], training: TrainingSettings, scratch: Path
) -> RunSettings:
    """Build the settings that train a recorded run again in a scratch folder."""
    execution = record["execution"]
    pretrained = None
    if record["pretrained"] is not None:
        below = (settings.experiments_folder or Path(execution["experiments_folder"])) / execution["pretrained_model"]
        pretrained = below if below.exists() else Path(record["pretrained"]["path"])
        pretrained = pretrained if get_published_weights(pretrained) else pretrained.absolute()
    return RunSettings(
        experiments_folder=scratch,
        experiment_name=record["experiment_name"],
        run_name=record["run_name"],
        **_find_dataset(settings, execution),
        pretrained_model=pretrained,
        num_threads=settings.num_threads,
        num_workers=settings.num_workers,
        allow_code_change=True,  # the witness checks this, with better messages
        allow_environment_change=True,
        allow_other_machine=True,
        recipe=record["recipe"],
        recipe_reason=record.get("recipe_reason"),
        training=training,
    )


def _find_dataset(settings: VerificationSettings, execution: dict[str, Any]) -> dict[str, Any]:
    """Find the current place of the data set, and the access to it."""
    access = settings.database_access or DatabaseAccess()
    reference = get_reference(settings.dataset_folder or "")
    recorded = settings.dataset_folder is None or reference is not None
    return {
        "dataset_folder": Path(execution["dataset_folder"]) if recorded else settings.dataset_folder,
        "database": str(reference) if reference else execution.get("database") if recorded else None,
        "db_config": access.config or (execution.get("db_config") and Path(execution["db_config"])),
        "fit": execution.get("fit", "squeeze"),
        "skip_bad": execution.get("skip_bad", False),
        "db_password": access.password,
        "ask_db_password": access.ask,
    }


def prepare_segment(folder: Path, record: dict[str, Any], target: Path, step: int) -> None:
    """Prepare a scratch run that continues from a step of the recorded run.

    Args:
        record: of the run, with the settings for the training here.

    Raises:
        SettingsError: the run has no checkpoint of that step.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    target.mkdir(parents=True)
    (target / RECORD).write_text(json.dumps(record), encoding="utf-8")
    if step == 0:
        return
    if step not in checkpoints.list_steps():
        steps = ", ".join(map(str, [0, *checkpoints.list_steps()]))
        raise SettingsError(f"--segment: {folder} has checkpoints of the steps {steps}, not of {step}")
    checkpoints.copy(step, target / CHECKPOINTS)
    for name in (METRICS, CHAIN):
        if (folder / name).exists():  # missing before the first epoch ends
            shutil.copy(folder / name, target)


class _SegmentEnd(Exception):
    """The last step of the segment was compared."""


class _Witness(Reporter):
    """Compares each digest of the second training with the record.

    Args:
        goes_on: the chain of a segment continues the recorded chain; otherwise there is a break before it.
    """

    def __init__(
        self,
        record: dict[str, Any],
        chain: list[dict[str, Any]],
        settings: VerificationSettings,
        reporter: Reporter,
        *,
        goes_on: bool,
    ) -> None:
        self.num_equal = 0
        self.differences: list[str] = []
        self.allowed: list[str] = []
        self.again: dict[str, Any] = {}
        self._goes_on = goes_on
        self._key = "digest"
        self._record = record
        self._chain = chain
        self._settings = settings
        self._reporter = reporter
        self._recorded = {line["step"]: line for line in chain if "tensors" in line}
        self._segment: tuple[int, int] | None = None
        self._num_before = 0

    def expect(self, segment: tuple[int, int]) -> None:
        """Start to compare a segment.

        Raises:
            SettingsError: the record has no digest in it.
        """
        begin, end = self._segment = segment
        self._key = "digest" if self._goes_on or begin == 0 else "tensors"
        lines = {line["step"]: line for line in self._chain if "tensors" in line}
        self._recorded = {step: line for step, line in lines.items() if begin < step <= end}
        self._num_before = len(self.differences)
        if not self._recorded:
            raise SettingsError(f"--segment {begin}:{end}: the run recorded no digest between these steps")

    def expect_end(self) -> None:
        """Start to compare the end, from the last checkpoint: any further digest is a difference."""
        self._segment, self._recorded, self._num_before = None, {}, len(self.differences)

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        """Compare the checkpoint at the start of a segment with the chain, since all later steps depend on it."""
        self._reporter.restore(step, state)
        before = ""
        for line in self._chain:
            if line["step"] == step and "tensors" in line:
                if compute_json_digest([before, step, compute_tensor_digests(state)]) != line["digest"]:
                    self.differences.append(f"the checkpoint of step {step} does not match the digest chain")
                return
            before = line["digest"]

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        is_portable = self._record["settings"].get("instruction_set") == "portable"
        allowed = {
            "code": self._settings.allow_code_change,
            "plugins": self._settings.allow_code_change,
            # A portable run gives the same bits with any libraries.
            "environment": self._settings.allow_environment_change or is_portable,
            "machine": self._settings.anyway,
        }
        for part, difference in find_identity_changes(self._record, record).items():
            if not allowed.get(part, False):
                option = "code" if part == "plugins" else part
                remedy = f"--allow_{option}_change trains it nevertheless" if part in allowed else "put it back"
                raise RunError(f"this run cannot be verified here: different {part}: {difference}; {remedy}")
            line = f"different {part}: {difference}"
            if part != "machine" and line not in self.allowed:
                self.allowed.append(line)
        self.again = record
        self._reporter.begin(record, num_steps, first_step)

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        self._reporter.digest(line, state)
        recorded = self._recorded.get(line["step"])
        if recorded is not None and recorded[self._key] == line[self._key]:
            self.num_equal += 1
        elif len(self.differences) == self._num_before:
            names = [
                name
                for name in line["tensors"]
                if (recorded or {"tensors": {}})["tensors"].get(name) != line["tensors"][name]
            ]
            what = f"the first of {len(names)} tensors is {names[0]}" if names else "the chain before it differs"
            self.differences.append(f"the first difference is at step {line['step']}: {what}")
        if self._segment is not None and line["step"] >= max(self._recorded):
            raise _SegmentEnd

    def step(self, step: Step) -> None:
        self._reporter.step(step)

    def epoch(self, line: dict[str, Any]) -> None:
        self._reporter.epoch(line)

    def evaluate(self, num_images: int) -> None:
        if self.num_equal < len(self._recorded) and not self.differences:
            self.differences.append("the record has digests of steps that the run did not reach")
        self._reporter.evaluate(num_images)


def _compare_results(recorded: Path, again: Path) -> list[str]:
    """Describe the differences of the weights and probabilities of two finished runs; empty if they are equal."""
    differences = []
    old, new = (load_model(folder / MODEL).classifier.state_dict() for folder in (recorded, again))
    apart = {
        name: _compute_largest_difference(old[name], new[name]) for name in new if not torch.equal(old[name], new[name])
    }
    if apart:
        name = max(apart, key=lambda name: apart[name])
        differences.append(
            f"{len(apart)} of {len(new)} tensors of {MODEL} differ, most of all {name}, by up to {apart[name]:.3g}"
        )
    old_probabilities, new_probabilities = (read_predictions(folder)[0] for folder in (recorded, again))
    if not np.array_equal(old_probabilities, new_probabilities):
        largest = np.abs(old_probabilities.astype(np.float64) - new_probabilities).max()
        moved = int((old_probabilities.argmax(axis=1) != new_probabilities.argmax(axis=1)).sum())
        differences.append(
            f"the probabilities of the test set differ by up to {largest:.3g}, "
            f"and {moved} of {len(old_probabilities)} images are classified differently"
        )
    return differences


def _compute_largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).abs().max())
