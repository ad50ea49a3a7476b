"""A worker of a sweep: takes a trial, trains it as an ordinary run, reports the result, and takes the next.

All workers meet in the study's attributes, which are changed under the storage's lock. `sweep` says what is searched
and on what; who means another search is refused. `running` has the trials that are taken and not yet told, by number:
what was drawn, who trains it, a count that this worker raises while it lives, and the result when there is one. A trial
is told, that is, becomes one of Optuna's, when all trials before it are. So the storage holds the same trials in the
same order whatever the workers did, and a worker that is killed leaves an entry that another one takes over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import (
    DivergedError,
    ImageClassifierError,
    Interrupted,
    ModelError,
    RunBusyError,
    RunError,
    SettingsError,
)
from image_classifier.experiment import RunResult, run
from image_classifier.reporter import Reporter, Reporters
from image_classifier.settings import RunSettings
from image_classifier.studies.plan import Plan, Planned, build_trial, find_best
from image_classifier.studies.storage import Storage
from image_classifier.tracking.identity import find_differing_keys
from image_classifier.tracking.layout import METRICS
from image_classifier.tracking.reading import read_epochs

FORMAT_VERSION = 1
BEAT_S = 5.0
"""Time between two signs of life of a worker."""
GRACE_S = 60.0
"""Time without a sign of life after which a worker is taken for lost. The clock is that of who waits."""
MAX_LOST = 5
"""Workers that a trial may lose in a row before an epoch is done; more, and it is taken for the reason itself."""
POLL_S = 0.5

_SWEEP, _RUNNING = "sweep", "running"
"""Attributes of the study."""

Entry = dict[str, Any]
T = TypeVar("T")
OpenReporter = Callable[[RunSettings], AbstractContextManager[Reporter]]
Train = Callable[..., RunResult]
"""Trains a run and leaves its folder, as `experiment.run` does and with what that takes."""


def get_run_name(number: int) -> str:
    """Name the run of a trial."""
    return f"trial-{number:04}"


@dataclass(frozen=True)
class Row:
    """What is known of a trial.

    Attributes:
        state: running, waiting (for the trials before it), complete, pruned or failed.
        accuracies: on the validation part, an epoch each.
        settings: of the space.
    """

    number: int
    state: str
    accuracies: Sequence[float]
    value: float | None
    seconds: float | None
    settings: Mapping[str, Any]
    error: str | None


class Watcher:
    """Shown all trials whenever something happened; this one is silent."""

    def show(self, rows: Sequence[Row]) -> None:
        """Some trials are new, or have come further."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a sweep does.

    Attributes:
        plan: decides the trials.
        num_trials: how many there are.
        max_failures: more trials that fail end the sweep.
        identity: what must be the same for all workers, by name; JSON.
        allowed: names of it that may differ nevertheless.
        build_settings: builds the settings of a trial's run out of those that were drawn, and the run's name.
        open_reporter: opens what is told of a run.
        snapshot: the data set; it is loaded anew for a trial whose images have another size.
        train: trains a run.
    """

    plan: Plan
    num_trials: int
    max_failures: int
    identity: Mapping[str, Any]
    allowed: Collection[str]
    build_settings: Callable[[Mapping[str, Any], str], RunSettings]
    open_reporter: OpenReporter
    snapshot: Snapshot | None = None
    command: Sequence[str] = ()
    watcher: Watcher = field(default_factory=Watcher)
    should_stop: Callable[[], bool] = lambda: False
    train: Train = run


@dataclass
class Claim:
    """A trial that this worker has taken."""

    number: int
    labels: dict[str, Any]
    told: Sequence[FrozenTrial]
    num_lost: int = 0
    accuracies: list[float] = field(default_factory=list)
    is_lost: bool = False  # another worker has taken it over


class Worker:
    """One of the workers of a sweep."""

    def __init__(self, storage: Storage, work: Work, *, beat_s: float = BEAT_S, grace_s: float = GRACE_S) -> None:
        self._storage = storage
        self._work = work
        self._beat_s = beat_s
        self._grace_s = grace_s
        pid = os.getpid()
        self._id = {"host": describe_host(), "pid": pid, "started": find_start(pid), "name": os.urandom(8).hex()}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._rows: Sequence[Row] = ()

    def run(self, most: int | None = None) -> Sequence[FrozenTrial]:
        """Train trials until all are told, or this worker has trained so many; return those that are told.

        Raises:
            SettingsError: the storage has another sweep under this name.
            RunError: more trials failed than may.
            Interrupted: this worker was asked to stop; what it trained is saved, and given back.
            ImageClassifierError: the storage or the disk refuses.
        """
        self._storage.change(self._join)
        num_trained = 0
        while True:
            told, claim = self._change(self._take)
            if claim is not None:
                self._carry_out(claim)
                num_trained += 1
                if num_trained == most:
                    return told
            elif len(told) >= self._work.num_trials:
                return told
            else:
                self._pause()

    def _change(self, work: Callable[[optuna.Study], T]) -> T:
        """Change the study, and show what it is then: not before others may change it, as a terminal may wait."""
        result = self._storage.change(work)
        self._work.watcher.show(self._rows)
        return result

    def _join(self, study: optuna.Study) -> None:
        """Agree on what is searched with those who began it."""
        identity = json.loads(json.dumps(self._work.identity))
        recorded = study.user_attrs.get(_SWEEP)
        if recorded is None and study.get_trials(deepcopy=False):
            raise SettingsError(
                f"{self._storage.place.title} has a study {self._storage.name!a} that is not a sweep of this package; "
                "choose another --experiment_name"
            )
        if recorded is None:
            study.set_user_attr(_SWEEP, identity)
            study.set_user_attr(_RUNNING, {})
            return
        changed = [part for part in find_differing_keys(recorded, identity) if part not in self._work.allowed]
        for part in changed[:1]:
            raise SettingsError(
                f"the sweep {self._storage.name!a} cannot continue, because its "
                f"{_describe_change(part, recorded, identity)}; "
                "choose another --experiment_name, or the original value"
            )

    def _take(self, study: optuna.Study) -> tuple[Sequence[FrozenTrial], Claim | None]:
        """Tell what can be told, and take the first trial that nobody trains, if there is one."""
        running: dict[str, Entry] = study.user_attrs[_RUNNING]
        self._tell(study, running)
        told, claim = study.get_trials(), None
        self._check_failures(told)
        lost = [int(number) for number, entry in running.items() if self._is_lost(int(number), entry)]
        number = len(told) + len(running)
        if lost:
            claim = self._take_over(min(lost), running, told)
        elif number < self._work.num_trials and len(running) < self._work.plan.num_parallel:
            labels = self._work.plan.begin(number, told).labels
            running[str(number)] = {
                "labels": labels,
                "worker": self._id,
                "beat": 0,
                "num_lost": 0,
                "accuracies": [],
                "started_at": _now(),
                "result": None,
            }
            claim = Claim(number, labels, told)
        if claim is not None:
            study.set_user_attr(_RUNNING, running)
        self._note(told, running)
        return told, claim

    def _take_over(self, number: int, running: dict[str, Entry], told: Sequence[FrozenTrial]) -> Claim:
        entry = running[str(number)]
        was_killed = entry["worker"] not in (None, self._id)
        entry |= {"num_lost": entry["num_lost"] + was_killed, "worker": self._id, "beat": 0}
        self._seen.pop(number, None)
        return Claim(number, entry["labels"], told, entry["num_lost"])

    def _tell(self, study: optuna.Study, running: dict[str, Entry]) -> None:
        """Tell the trials whose turn it is. One that was told and is still here comes of a worker that was killed."""
        number = len(study.get_trials(deepcopy=False))
        for key in [key for key in running if int(key) < number]:
            del running[key]
        while (entry := running.get(str(number), {})).get("result"):
            study.add_trial(build_trial(self._work.plan.space, entry))
            del running[str(number)]
            number += 1
            study.set_user_attr(_RUNNING, running)

    def _check_failures(self, told: Sequence[FrozenTrial]) -> None:
        failed = [trial for trial in told if trial.state is TrialState.FAIL]
        if len(failed) > self._work.max_failures:
            raise RunError(
                f"{len(failed)} of {len(told)} trials failed, more than --max_failures {self._work.max_failures}; the "
                f"last: {failed[-1].user_attrs['error']}; correct the space, or allow more"
            )

    def _is_lost(self, number: int, entry: Entry) -> bool:
        """Say whether nobody trains a trial: it was given back, its process is dead, or gives no sign of life."""
        worker = entry["worker"]
        if entry["result"] is not None:
            return False
        if worker in (None, self._id):  # one of this worker, which trains none now: it did not hear that it has it
            return True
        if (
            self._id["started"]
            and worker["host"] == self._id["host"]
            and worker["started"] != find_start(worker["pid"])
        ):
            return True
        sign, now = (worker["name"], entry["beat"]), time.monotonic()
        if self._seen.get(number, (None, 0.0))[0] != sign:
            self._seen[number] = (sign, now)
        return now - self._seen[number][1] > self._grace_s

    def _carry_out(self, claim: Claim) -> None:
        """Train a trial and write down what came of it; nothing, where another worker has taken it over."""
        planned = self._work.plan.begin(claim.number, claim.told)
        try:
            if claim.num_lost > MAX_LOST:
                result: Entry | None = _describe_failure(
                    f"{claim.num_lost} workers were lost before an epoch was done; see their logs"
                )
            else:
                with self._beating(claim):
                    result = self._train(claim, planned)
        except BaseException:
            self._storage.change(lambda study: self._give_back(study, claim))
            raise
        if result is not None:
            self._change(lambda study: self._write(study, claim, {**result, "ended_at": _now()}))

    def _train(self, claim: Claim, planned: Planned) -> Entry | None:
        """Train a trial to its end, or until it is pruned or fails; None where it was taken over."""
        run_name = get_run_name(claim.number)
        while True:
            try:
                settings = self._work.build_settings(self._work.plan.space.get_values(claim.labels), run_name)
                result = self._run(settings, claim, planned)
                return _describe_result(claim, planned, settings, result)
            except RunBusyError:  # the worker that was taken for lost is still at it
                self._pause()
                if claim.is_lost:
                    return None
            except Interrupted:
                if claim.is_lost:
                    return None
                raise
            except (SettingsError, ModelError, DivergedError) as error:
                return _describe_failure(str(error))
            except (ImageClassifierError, OSError):  # nothing that the trial's settings are the reason of
                raise
            except Exception as error:
                return _describe_failure(f"{type(error).__name__}: {error}")

    def _run(self, settings: RunSettings, claim: Claim, planned: Planned) -> RunResult | None:
        """Train a run, or go on with it; None if it is pruned."""
        trial = TrialReporter(planned, settings, claim.accuracies)
        try:
            with self._work.open_reporter(settings) as reporter:
                result = self._work.train(
                    settings,
                    snapshot=choose_snapshot(self._work.snapshot, settings),
                    reporter=Reporters(trial, reporter),
                    should_stop=lambda: trial.is_pruned or claim.is_lost or self._work.should_stop(),
                    command=self._work.command,
                )
        except (_Pruned, Interrupted):
            if trial.is_pruned:
                return None
            raise
        if not claim.accuracies:  # it was finished before
            trial.replay()
        return None if trial.is_pruned else result

    def _pause(self) -> None:
        time.sleep(POLL_S)
        if self._work.should_stop():
            raise Interrupted("stopped; start the same command again to continue")

    @contextmanager
    def _beating(self, claim: Claim) -> Iterator[None]:
        """Give signs of life within the block."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._beat_s):
                try:
                    self._change(lambda study: self._beat(study, claim))
                except ImageClassifierError:  # which the training's end meets, too, and says
                    continue

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, study: optuna.Study, claim: Claim) -> None:
        running: dict[str, Entry] = study.user_attrs[_RUNNING]
        entry = running.get(str(claim.number))
        claim.is_lost = entry is None or entry["worker"] != self._id
        if entry is None or claim.is_lost:
            return
        if len(claim.accuracies) > len(entry["accuracies"]):  # of an epoch that no worker had done before
            entry |= {"num_lost": 0, "accuracies": list(claim.accuracies)}
        entry["beat"] += 1
        study.set_user_attr(_RUNNING, running)
        self._note(study.get_trials(deepcopy=False), running)

    def _give_back(self, study: optuna.Study, claim: Claim) -> None:
        running: dict[str, Entry] = study.user_attrs[_RUNNING]
        entry = running.get(str(claim.number))
        if entry is not None and entry["worker"] == self._id:
            entry["worker"] = None
            study.set_user_attr(_RUNNING, running)

    def _write(self, study: optuna.Study, claim: Claim, result: Entry) -> None:
        """Write a result down, and tell it if it is its turn. Who was taken over has the same one as who took over."""
        running: dict[str, Entry] = study.user_attrs[_RUNNING]
        entry = running.get(str(claim.number))
        if entry is not None and entry["result"] is None:
            entry |= {"result": result, "accuracies": list(claim.accuracies)}
            study.set_user_attr(_RUNNING, running)
        self._tell(study, running)
        self._note(study.get_trials(deepcopy=False), running)

    def _note(self, told: Sequence[FrozenTrial], running: Mapping[str, Entry]) -> None:
        self._rows = list_rows(told, running, self._work.plan)


class _Pruned(Exception):
    """A trial was pruned before, in an epoch that its checkpoint has."""


class TrialReporter(Reporter):
    """Judges a trial after each epoch, and decides whether it is pruned.

    Args:
        accuracies: on the validation part, an epoch each; filled here.

    Attributes:
        is_pruned: whether the run is to be stopped, as the trials before it were better.
    """

    def __init__(self, planned: Planned, settings: RunSettings, accuracies: list[float]) -> None:
        self._planned = planned
        self._settings = settings
        self._accuracies = accuracies
        self.is_pruned = False
        accuracies.clear()

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        self.replay()
        if self.is_pruned:
            raise _Pruned

    def replay(self) -> None:
        """Judge the epochs that a run has behind it."""
        for line in read_epochs(self._settings.run_folder) if self._has_epochs() else ():
            self.epoch(line)

    def _has_epochs(self) -> bool:
        return (self._settings.run_folder / METRICS).exists()

    def epoch(self, line: dict[str, Any]) -> None:
        self._accuracies.append(line["validation_accuracy"])
        if not self._is_last() and not self.is_pruned:
            self.is_pruned = self._planned.report(len(self._accuracies), self._accuracies[-1])

    def _is_last(self) -> bool:
        """Say whether the run ends after this epoch by itself, so that there is nothing to prune."""
        training = self._settings.training
        patience, num_epochs = training.early_stopping, len(self._accuracies)
        best = 1 + self._accuracies.index(max(self._accuracies))
        return num_epochs >= training.num_epochs or 0 < patience <= num_epochs - best


def choose_snapshot(snapshot: Snapshot | None, settings: RunSettings) -> Snapshot | None:
    """Choose a snapshot that is loaded, if its images have the size that a run needs."""
    return snapshot if snapshot is not None and snapshot.image_size == settings.training.image_size else None


def judge(accuracies: Sequence[float], keep: str) -> float:
    """Give the validation accuracy of the weights that become model.pth."""
    return max(accuracies) if keep == "best" else accuracies[-1]


def list_rows(told: Sequence[FrozenTrial], running: Mapping[str, Entry], plan: Plan) -> list[Row]:
    """List what is known of all trials, by number."""
    rows = []
    for trial in told:
        assert trial.datetime_complete is not None and trial.datetime_start is not None
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
        state = {TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())
        accuracies = [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)]
        values = plan.space.get_values(trial.params)
        error = trial.user_attrs.get("error")
        rows.append(Row(trial.number, state, accuracies, trial.value, seconds, values, error))
    for number, entry in sorted((int(number), entry) for number, entry in running.items()):
        state = "running" if entry["result"] is None else "waiting"
        values = plan.space.get_values(entry["labels"])
        rows.append(Row(number, state, entry["accuracies"], None, None, values, None))
    return rows


def describe_host() -> str:
    """Describe where a process's number means something: this machine, or the container on it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def find_start(pid: int) -> str | None:
    """Find when a process was started, in the system's ticks; None if it has ended, or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _describe_result(claim: Claim, planned: Planned, settings: RunSettings, result: RunResult | None) -> Entry:
    accuracies = claim.accuracies
    return {
        "state": (TrialState.COMPLETE if result else TrialState.PRUNED).name,
        "value": judge(accuracies, settings.training.keep) if result else accuracies[-1],
        "system_attrs": planned.system_attrs,
        "user_attrs": {
            "run": f"{settings.experiment_name}/{settings.run_name}",
            **({"weights_digest": result.weights_digest} if result else {}),
        },
    }


def _describe_failure(error: str) -> Entry:
    reason = " ".join(error.split())[:1000]
    return {"state": TrialState.FAIL.name, "value": None, "system_attrs": {}, "user_attrs": {"error": reason}}


def _describe_change(part: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Say what of a sweep's identity was what, and is what, by its innermost name."""
    was, now = recorded.get(part), present.get(part)
    if isinstance(was, dict) and isinstance(now, dict):
        for key in find_differing_keys(was, now):
            return f"{part}: {_describe_change(key, was, now)}" if part != "space" else _describe_change(key, was, now)
    return f"{part} was {'absent' if was is None else was}, is {'absent' if now is None else now}"


def _now() -> str:
    return datetime.now().isoformat(timespec="milliseconds")


def get_winner(told: Sequence[FrozenTrial]) -> FrozenTrial:
    """Get the trial with the best validation accuracy.

    Raises:
        RunError: no trial came to its end.
    """
    best = find_best(told)
    if best is None:
        raise RunError("no trial is complete: each was pruned or failed; look at their run folders")
    return best


def refit(
    seeds: Sequence[int],
    build_settings: Callable[[int], RunSettings],
    open_reporter: OpenReporter,
    *,
    snapshot: Snapshot | None = None,
    command: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> list[RunResult]:
    """Train settings on all images, with each seed; a run that another worker trains is waited for.

    Raises:
        ImageClassifierError: a run cannot be trained.
        Interrupted: should_stop said so; the same command goes on.
    """
    results: dict[int, RunResult] = {}
    while True:
        for seed in seeds:
            settings = build_settings(seed)
            try:
                if seed not in results:
                    with open_reporter(settings) as reporter:
                        results[seed] = run(
                            settings,
                            snapshot=choose_snapshot(snapshot, settings),
                            reporter=reporter,
                            should_stop=should_stop,
                            command=command,
                        )
            except RunBusyError:
                continue
            except RunError:
                if settings.resume or not settings.run_folder.exists():
                    raise  # else another worker began it at the same moment
        if len(results) == len(seeds):
            return [results[seed] for seed in seeds]
        time.sleep(POLL_S)
