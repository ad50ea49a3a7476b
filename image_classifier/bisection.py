"""Finds where two runs that should be equal diverge: first step, tensor, layer and operator, and the probable cause.

The digest chains give the interval of steps. Both runs are trained again from the last checkpoint before it, with a
digest at each step. Then the first different step is trained once more, and each result in it is compared.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from image_classifier.access import DatabaseAccess
from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import ImageClassifierError, Interrupted, RunError, SettingsError
from image_classifier.experiment import run
from image_classifier.plugins import PLUGGABLE, check_allowed
from image_classifier.reporter import Reporter
from image_classifier.settings import TrainingSettings
from image_classifier.storage import scratch_folder
from image_classifier.tracking.causes import Cause, Evidence, find_cause
from image_classifier.tracking.checking import verify_files
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.divergence import (
    ChainDifference,
    Digests,
    TensorDifference,
    compare_tensors,
    find_chain_difference,
    find_flipped_bit,
    list_differing,
    list_digests,
)
from image_classifier.tracking.identity import compute_tensor_digests
from image_classifier.tracking.layout import CHAIN, CHECKPOINTS, MODEL, PREDICTIONS, RECORD
from image_classifier.tracking.reading import read_chain, read_manifest, read_predictions, read_record
from image_classifier.tracking.record import describe_settings, find_identity_changes
from image_classifier.tracking.tape import NOWHERE, Tape, find_first_difference
from image_classifier.training.determinism import (
    Lack,
    build_capped_environment,
    cap_instruction_set,
    resolve_nearest_settings,
    restore_nearest_settings,
)
from image_classifier.training.loop import Step
from image_classifier.training.watching import Result, StepWatch
from image_classifier.verification import VerificationSettings, build_run_settings, prepare_segment

FORMAT_VERSION = 1
NAMES = ("A", "B")
HERE = "this machine"

Start = tuple[Path, int]
"""Run folder and step of the checkpoint at which a segment starts."""


@dataclass(frozen=True, kw_only=True)
class BisectionSettings:
    """Which runs to compare, and where their inputs are now.

    Attributes:
        runs: Two runs, or one to compare with this machine.
        dataset_folder: Their data set, if it moved; or db:NAME@VERSION.
        database_access: Access to the database, if the data set is in one.
        experiments_folder: Folder of their pretrained models, if they moved.
        num_threads: Threads that compute shards; 0 for one per available core.
        num_workers: Threads that prepare batches.
    """

    runs: tuple[Path, ...]
    dataset_folder: Path | None = None
    database_access: DatabaseAccess | None = None
    experiments_folder: Path | None = None
    num_threads: int = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= len(self.runs) <= 2:
            raise SettingsError(f"bisect takes one run, or two, got: {len(self.runs)}")
        if len(self.runs) == 2 and self.runs[0].resolve() == self.runs[1].resolve():
            raise SettingsError(f"{self.runs[1]} is named twice; name it once to compare it with this machine")


@dataclass(frozen=True)
class Finding:
    """Where two runs diverge.

    Attributes:
        runs: their names.
        num_steps: of the longer run.
        equal_step: last step after which the states are known to be equal.
        step: first step after which they differ; None if they never do, or only after the last step.
        is_exact: whether `step` is certainly the first; otherwise steps between the two are unknown.
        tensors: names of the tensors of the state that differ after the step.
        result: first different result within the step; None if the step could not be replayed.
        values: size of the difference of `result` or, if that is None, of the first tensor.
        cause: probable cause.
        replays: what was trained again here, and whether it matched the record.
        segments: run, first and last step of everything that was trained.
    """

    verdict: Literal["SAME", "DIFFERENT"]
    runs: tuple[str, str]
    num_steps: int
    equal_step: int
    step: int | None = None
    is_exact: bool = False
    tensors: tuple[str, ...] = ()
    result: Result | None = None
    values: TensorDifference | None = None
    cause: Cause | None = None
    replays: tuple[str, ...] = ()
    segments: tuple[tuple[str, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert it to JSON types."""
        segments = [{"run": name, "from": begin, "to": end} for name, begin, end in self.segments]
        values = self.values and self.values.to_json()
        return {"format_version": FORMAT_VERSION, **asdict(self), "values": values, "segments": segments}


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Attributes:
        settings: for training it again.
        digests: tensor digests of its chain, by step.
        head: last digest of its chain; "" if the chain has breaks.
        weights_digest: of the final weights.
        training: its settings, or the nearest ones that this processor supports.
        lacks: settings that this processor does not support.
    """

    name: str
    settings: VerificationSettings
    record: dict[str, Any]
    digests: Digests
    head: str
    weights_digest: str
    training: TrainingSettings
    lacks: tuple[Lack, ...]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.settings.run_folder

    @property
    def last_step(self) -> int:
        """The last step with a digest."""
        return max(self.digests, default=0)

    def list_checkpoints(self) -> list[int]:
        """List the steps that have a checkpoint and a digest to check it."""
        return [step for step in Checkpoints(self.folder / CHECKPOINTS).list_steps() if step in self.digests]


@dataclass(frozen=True)
class Segment:
    """A part of a run to train again.

    Attributes:
        source: run folder with the checkpoint of the step `begin`.
        folder: scratch folder for the training.
        state: expected digests of this checkpoint.
        expected: expected digests by step; the training ends at the first difference.
        is_dense: whether each step has a digest and a checkpoint.
        tape: records the results within each step; None to record only states.
    """

    side: Side
    source: Path
    begin: int
    end: int
    folder: Path
    state: dict[str, str] = field(default_factory=dict)
    expected: Digests = field(default_factory=dict)
    is_dense: bool = True
    tape: Tape | None = None


@dataclass(frozen=True)
class Trained:
    """A trained segment.

    Attributes:
        digests: of the state after each step.
        difference: first step whose digests were not as expected.
        state: at the end.
        changes: differences between the record and this machine, by setting or part of the identity.
    """

    run_folder: Path
    digests: Digests
    difference: int | None
    state: dict[str, Tensor]
    changes: dict[str, str]
    tape: Tape | None


class _SegmentEnd(Exception):
    """The last step of the segment is done."""


class _Follower(Reporter):
    """Follows a segment to its end, or to the first unexpected digest."""

    def __init__(self, segment: Segment, reporter: Reporter) -> None:
        self.watch = None if segment.tape is None else StepWatch(segment.tape.note)
        self.digests: Digests = {}
        self.difference: int | None = None
        self.state: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {}
        self._segment = segment
        self._reporter = reporter

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        self._check(first_step == self._segment.begin)
        self.record = record
        self._reporter.begin(record, num_steps, first_step)

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        segment = self._segment
        digests = _shorten(compute_tensor_digests(state))
        self._check(step == segment.begin and not (segment.state and list_differing(digests, segment.state)))
        if segment.begin == segment.end:
            self._end(state)

    def _check(self, is_right: bool) -> None:
        if not is_right:
            raise RunError(
                f"the checkpoint of step {self._segment.begin} in {self._segment.source} is not the state that the "
                "chain has there"
            )

    def step(self, step: Step) -> None:
        self._reporter.step(step)

    def epoch(self, line: dict[str, Any]) -> None:
        self._reporter.epoch(line)

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        segment, step = self._segment, line["step"]
        self.digests[step] = line["tensors"]
        if segment.tape is not None:
            what = f"the step of {self.record['settings']['optimizer']}"
            for name in _list_in_order(state):
                segment.tape.note(Result("update", name, what), state[name])
        if step in segment.expected and list_differing(segment.expected[step], line["tensors"]):
            self.difference = step
        if self.difference is not None or step >= segment.end:
            self._end(state)

    def _end(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        raise _SegmentEnd


def _list_in_order(state: dict[str, Tensor]) -> list[str]:
    """List tensors in the order in which a step changes them: optimizer state, weights, average of the weights."""

    def find_place(name: str) -> int:
        return 2 if name.startswith("average.") else int(name.rpartition(".")[0] not in state)

    return sorted(state, key=find_place)


def _shorten(digests: dict[str, str]) -> dict[str, str]:
    return {name: digest[:16] for name, digest in digests.items()}


def train_segment(segment: Segment, reporter: Reporter | None = None) -> Trained:
    """Train a segment of a run again, with the nearest settings that this machine supports.

    Raises:
        ImageClassifierError: its data or weights are missing or differ, or the reporter stopped it.
    """
    side = segment.side
    cap_instruction_set(side.training.instruction_set)
    training, others = resolve_nearest_settings(side.training)
    if segment.is_dense:
        training = replace(training, digest_every=1)
    again = replace(
        build_run_settings(side.settings, side.record, training, segment.folder),
        resume=True,
        checkpoint_every="1steps" if segment.is_dense and segment.tape is None else "1000000steps",
    )
    snapshot = load_snapshot(again.dataset, again.database_access, again.reading)
    snapshot = snapshot.recognize(side.record["data"]["digest"])
    if snapshot.digest != side.record["data"]["digest"]:
        raise RunError(f"its data set differs here: {side.record['data']['digest'][:12]}, is {snapshot.digest[:12]}")
    record = {**side.record, "settings": describe_settings(training)}
    prepare_segment(segment.source, record, again.run_folder, segment.begin)
    follower = _Follower(segment, reporter or Reporter())
    with suppress(_SegmentEnd):
        run(again, snapshot=snapshot, reporter=follower)
    present = {**(follower.record or side.record), "settings": side.record["settings"]}
    changes = {lack.setting: lack.describe_replacement() for lack in (*side.lacks, *others)}
    changes |= find_identity_changes(side.record, present)
    return Trained(again.run_folder, follower.digests, follower.difference, follower.state, changes, segment.tape)


def _train_where_possible(segment: Segment, reporter: Reporter) -> Trained:
    """Train a segment in this process or, if it needs another instruction set, in a new process."""
    try:
        cap_instruction_set(segment.side.training.instruction_set)
    except SettingsError:
        access = segment.side.settings.database_access
        settings = replace(segment.side.settings, database_access=access and replace(access, ask=None))
        # Each tensor is returned through a file descriptor; a tape of all tensors would need too many.
        tape = Tape(wanted=NOWHERE) if segment.tape is not None and segment.tape.keeps_all else segment.tape
        alone = replace(segment, side=replace(segment.side, settings=settings), tape=tape)
        with _environment(build_capped_environment(segment.side.training.instruction_set)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    return pool.submit(train_segment, alone).result()
                except BrokenProcessPool as error:
                    raise RunError("the training process was killed, perhaps for lack of memory") from error
    return train_segment(segment, reporter)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Replace the environment variables for processes that are started in this block."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def bisect(settings: BisectionSettings, reporter: Reporter | None = None) -> Finding:
    """Find where two runs, or a run and this machine, diverge.

    Raises:
        RunError: a folder has no finished run, or was changed.
        Interrupted: the reporter stopped it.
    """
    sides = [_load_side(name, folder, settings) for name, folder in zip(NAMES, settings.runs, strict=False)]
    with scratch_folder() as scratch:
        bisection = _Bisection(sides, scratch, reporter or Reporter())
        return bisection.compare_with_machine() if len(sides) == 1 else bisection.compare_runs()


def _load_side(name: str, folder: Path, settings: BisectionSettings) -> Side:
    changed = verify_files(folder)
    if changed:
        raise RunError(f"{folder} was changed after the run: {changed[0]}; restore it")
    record = read_record(folder)
    for kind in PLUGGABLE:
        check_allowed(kind, record["settings"].get(kind, "sgd"), folder / RECORD, RunError)
    again = VerificationSettings(
        run_folder=folder,
        dataset_folder=settings.dataset_folder,
        database_access=settings.database_access,
        experiments_folder=settings.experiments_folder,
        num_threads=settings.num_threads,
        num_workers=settings.num_workers,
    )
    return _build_side(name, again, record)


def _build_side(name: str, settings: VerificationSettings, record: dict[str, Any]) -> Side:
    folder = settings.run_folder
    chain, weights_digest = read_chain(folder), read_manifest(folder)["weights_digest"]
    head = chain[-1]["digest"] if chain and not any("break" in line for line in chain) else ""
    training, lacks = restore_nearest_settings(record["settings"])
    digests = list_digests(folder, chain)
    return Side(name, settings, record, digests, head, weights_digest, training, tuple(lacks))


class _Bisection:
    """Trains segments of runs again in a scratch folder, and records what was trained."""

    def __init__(self, sides: list[Side], scratch: Path, reporter: Reporter) -> None:
        self._sides = sides
        self._scratch = scratch
        self._reporter = reporter
        self._segments: list[tuple[str, int, int]] = []
        self._num_trained = 0
        self._replays: dict[str, None] = {}
        self._changed: dict[str, str] = {}

    def compare_runs(self) -> Finding:
        """Compare two runs."""
        first, second = self._sides
        found = find_chain_difference(first.digests, second.digests)
        if found is None:
            return self._compare_ends(first, second)
        start = self._find_start(found.equal)
        state, step = start, found.step
        whole = other = None
        if start[1] < found.step - 1:
            whole = self._train(first, start, found.step)
            other = self._train(second, start, found.step, expected=whole.digests if whole else {})
            if whole is not None and other is not None and other.difference is not None:
                self._note_whether_recorded(first, whole, found.step)
                step = other.difference
                state = (other.run_folder, step - 1)
        if state[1] == step - 1:
            finding, *seen = self._see_step(state, step)
            if finding is not None:
                return finding
            whole, other = whole or seen[0], other or seen[1]
            if whole and other and step in whole.digests:
                names = list_differing(whole.digests[step], other.digests[step])
                found = ChainDifference(step - 1, step, names) if names else found
        return self._describe_recorded(start, found, [whole, other])

    def compare_with_machine(self) -> Finding:
        """Compare a run with training it again on this machine."""
        (side,) = self._sides
        start = (side.folder, 0)
        whole = self._train(side, start, sys.maxsize, expected=side.digests, is_dense=False)
        if whole is None:
            raise RunError(
                f"{next(iter(self._replays))}; name its new place with --dataset_folder or --experiments_folder"
            )
        step = whole.difference
        if step is None:
            again = replace(side.settings, run_folder=whole.run_folder)
            return self._compare_ends(side, _build_side(HERE, again, side.record))
        equal = max((number for number in whole.digests if number < step), default=0)
        names = list_differing(side.digests[step], whole.digests[step])
        return self._describe_recorded(start, ChainDifference(equal, step, names), [whole])

    def _find_start(self, equal: int) -> Start:
        """Find the last checkpoint at which the runs are equal."""
        found = [(step, side.folder) for side in self._sides for step in side.list_checkpoints() if step <= equal]
        begin, source = max(found, default=(0, self._sides[0].folder), key=lambda each: each[0])
        return source, begin

    def _train(
        self,
        side: Side,
        start: Start,
        end: int,
        *,
        expected: Digests | None = None,
        is_dense: bool = True,
        tape: Tape | None = None,
    ) -> Trained | None:
        """Train a segment again; note the reason and return None if that is impossible."""
        (source, begin), folder = start, self._scratch / f"{self._num_trained}"
        self._num_trained += 1
        recorded = next((each.digests.get(begin, {}) for each in self._sides if each.folder == source), {})
        segment = Segment(side, source, begin, end, folder, recorded, expected or {}, is_dense, tape)
        try:
            trained = _train_where_possible(segment, self._reporter)
        except Interrupted:
            raise
        except ImageClassifierError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._replays[f"{side.name} cannot be trained again here: {error}"] = None
            return None
        if end > begin:
            self._segments.append((side.name, begin, max(trained.digests, default=begin)))
        for part, change in trained.changes.items():
            self._replays[f"{side.name} was trained again with a change: {part}: {change}"] = None
        self._changed |= trained.changes
        return trained

    def _see_step(self, start: Start, step: int) -> tuple[Finding | None, Trained | None, Trained | None]:
        """Train one step of both runs from the same state, and find the first different result, if there is one."""
        first, second = self._sides
        one = self._train(first, start, step, tape=Tape())
        if one is None or one.tape is None:
            return None, None, None
        other = self._train(second, start, step, tape=Tape(one.tape.digests))
        if other is None or other.tape is None:
            return None, one, None
        has_same_shards = first.record["settings"].get("shards") == second.record["settings"].get("shards")
        key = find_first_difference(one.tape, other.tape, sees_shards=has_same_shards)
        if key is None:
            return None, one, other
        kept = one.tape.kept
        if key not in kept and (again := self._train(first, start, step, tape=Tape(wanted=key))) and again.tape:
            kept = again.tape.kept
        values = compare_tensors(kept[key], other.tape.kept[key]) if key in kept else None
        for side, trained in ((first, one), (second, other)):
            self._note_whether_recorded(side, trained, step)
        names = list_differing(one.digests[step], other.digests[step])
        result = _join(one.tape.results[key], other.tape.results[key])
        batches = one.tape.batch, other.tape.batch
        cause = find_cause(Evidence((first.record, second.record), step, result, values, batches, names))
        return self._finish("DIFFERENT", step - 1, step, True, names, result, values, cause), one, other

    def _describe_recorded(self, start: Start, found: ChainDifference, replays: list[Trained | None]) -> Finding:
        """Describe a difference that training one step again does not show."""
        both_recorded, found = found.step, self._narrow(found, replays)
        step, names = found.step, found.tensors
        for side, trained in zip(self._sides, replays, strict=True):
            known = step if step in side.digests else both_recorded
            if trained is not None and len(self._sides) == 2 and known in trained.digests:
                self._note_whether_recorded(side, trained, known)
        able = [each for each in replays if each is not None and step in each.digests]
        reached = min(able, key=lambda each: max(each.digests), default=None)
        if reached is not None and step < max(reached.digests):
            reached = self._train(self._sides[replays.index(reached)], start, step)
        values = None
        if reached is not None:
            states = [self._find_state(reached, side, step) for side in self._sides]
            states += [reached.state] * (2 - len(states))
            values = _compare_first(names, *states)
        records = self._sides[0].record, self._sides[-1].record
        state, changed = list(max(self._sides[0].digests.items())[1]), self._changed if len(self._sides) == 1 else {}
        cause = find_cause(Evidence(records, step, None, values, tensors=names, state=state, changed=changed))
        return self._finish("DIFFERENT", found.equal, step, step == found.equal + 1, names, None, values, cause)

    def _narrow(self, found: ChainDifference, replays: list[Trained | None]) -> ChainDifference:
        """Find the first step at which a record differs from both runs as trained again, where these are equal."""
        digests = [trained.digests for trained in replays if trained is not None]
        if len(digests) < 2:
            return found
        equal, common = found.equal, digests[0]
        is_known = [found.step in common and side.digests.get(found.step) == common[found.step] for side in self._sides]
        for step in sorted(common.keys() & digests[1].keys()) if any(is_known) else ():
            for side in self._sides:
                if names := list_differing(side.digests.get(step, common[step]), common[step]):
                    return ChainDifference(equal, step, names)
            if all(step in side.digests or known for side, known in zip(self._sides, is_known, strict=True)):
                equal = max(equal, step)
        return found

    def _find_state(self, reached: Trained, side: Side, step: int) -> dict[str, Tensor]:
        """Find a run's state after a step: from training it again, its checkpoint, or a flipped bit."""
        digests = side.digests.get(step, reached.digests[step])
        apart = list_differing(digests, reached.digests[step])
        if not apart:
            return reached.state
        if step in side.list_checkpoints():
            kept = self._train(side, (side.folder, step), step)
            return {} if kept is None else kept.state
        name, *others = apart
        if others or name not in reached.state or name not in digests:
            return {}
        found = find_flipped_bit(reached.state[name], digests[name])
        return {} if found is None else {**reached.state, name: found}

    def _note_whether_recorded(self, side: Side, trained: Trained, step: int) -> None:
        here = f"{side.name}, trained again here,"
        if step in side.digests:
            is_same = not list_differing(side.digests[step], trained.digests[step])
            self._replays[f"{here} is {'' if is_same else 'not '}as recorded at step {step}"] = None
        elif not any(line.startswith(here) for line in self._replays):
            self._replays[f"{here} was only trained to step {step}, for which its record has no digest"] = None

    def _compare_ends(self, first: Side, second: Side) -> Finding:
        """Compare two runs whose chains agree on all common steps."""
        equal = max(first.digests.keys() & second.digests.keys(), default=0)
        evidence = Evidence((first.record, second.record), equal + 1, changed=self._changed)
        if first.last_step != second.last_step:
            shorter = first if first.last_step < second.last_step else second
            self._replays[f"the chain of {shorter.name} ends after step {shorter.last_step}; the other goes on"] = None
            is_exact = equal == shorter.last_step
            return self._finish("DIFFERENT", equal, equal + 1, is_exact, cause=find_cause(evidence))
        if first.weights_digest != second.weights_digest:
            what, states = MODEL, [load_model(side.folder / MODEL).classifier.state_dict() for side in (first, second)]
        else:
            what, states = PREDICTIONS, [_read_results(side.folder) for side in (first, second)]
        names = list_differing(*map(compute_tensor_digests, states))
        is_chain_comparable = first.digests.keys() == second.digests.keys() and bool(first.head and second.head)
        if not names and not (is_chain_comparable and first.head != second.head):
            return self._finish("SAME", equal, None)
        if not names:
            what = f"{CHAIN}: its digests do not match these states, although those of each tensor do"
        self._replays[f"the states are equal up to the last step; the difference is in {what}"] = None
        values = _compare_first(names, *states)
        cause = find_cause(replace(evidence, values=values, tensors=names, state=list(states[0])))
        return self._finish("DIFFERENT", equal, None, True, names, None, values, cause)

    def _finish(
        self,
        verdict: Literal["SAME", "DIFFERENT"],
        equal: int,
        step: int | None,
        is_exact: bool = False,
        tensors: tuple[str, ...] = (),
        result: Result | None = None,
        values: TensorDifference | None = None,
        cause: Cause | None = None,
    ) -> Finding:
        names = (str(self._sides[0].folder), str(self._sides[1].folder) if len(self._sides) == 2 else HERE)
        last = max(side.last_step for side in self._sides)
        replays, segments = tuple(self._replays), tuple(self._segments)
        return Finding(verdict, names, last, equal, step, is_exact, tensors, result, values, cause, replays, segments)


def _read_results(folder: Path) -> dict[str, Tensor]:
    probabilities, labels = read_predictions(folder)
    return {"probabilities": torch.from_numpy(probabilities.copy()), "labels": torch.from_numpy(labels.copy())}


def _compare_first(
    names: Sequence[str], first: dict[str, Tensor], second: dict[str, Tensor]
) -> TensorDifference | None:
    """Compare the first of these tensors that is in both states."""
    return next(
        (compare_tensors(first[name], second[name]) for name in names if name in first and name in second), None
    )


def _join(first: Result, second: Result) -> Result:
    """Merge the results of two runs in the same place; name both operators if they differ."""
    if first.operator == second.operator:
        return first
    return replace(first, operator=f"{first.operator} in one, {second.operator} in the other")
