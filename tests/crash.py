"""Tiny runs that are killed with SIGKILL, at each call to the disk and at random moments, and what must hold then.

After each kill the run folder must hold the old state or the new one, never one between, and once resumed the run must
end with the bits of one that nobody killed. That is SQLite's way (fail the n-th call for n = 1, 2, 3 ... until the
operation completes) and PostgreSQL's (what was committed survives, what was not does not, and the server works).

A victim is forked from a process that has imported torch and computed nothing, which is safe, and takes 10 ms instead
of the seconds that the import takes. So a process that forks must never compute: all of that is left to its children.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from tqdm import tqdm

from image_classifier.cli.train import place_aside
from image_classifier.experiment import run
from image_classifier.settings import RunSettings
from image_classifier.storage import TEMPORARY_PREFIX, FaultyDisk, scratch_folder
from image_classifier.tracking.checking import find_changed_files, is_finished
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.identity import compute_tensor_digests, compute_weights_digest
from image_classifier.tracking.layout import (
    CHAIN,
    CHECKPOINTS,
    EVALUATION,
    FIGURE,
    METRICS,
    MODEL,
    PREDICTIONS,
    RECORD,
)
from image_classifier.tracking.reading import (
    read_chain,
    read_epochs,
    read_evaluation,
    read_manifest,
    read_predictions,
    read_record,
)
from image_classifier.training import ranks
from image_classifier.visualization import figures
from tests.tiny import make_settings, write_tiny_dataset

NUM_EPOCHS = 2
VALUES: dict[str, Any] = {
    "num_epochs": NUM_EPOCHS,
    "batch_size": 8,
    "schedule": "triangular",
    "flip": "random",
    "translate": 2,
    "validation_fraction": 0.1,
    "keep": "best",
    "sampler": "balanced",
    "mixup": 0.4,
    "rand_augment": 9,
    "ema_decay": 0.5,
    "digest_every": 1,
    "checkpoint_every": "10steps",  # within both epochs, whose ends are the steps 13 and 26
}
"""Settings of a run that has all that a state can have: momentum, a schedule, averages, the best weights so far."""

LONGEST_S = 400
"""Time limit of a child: more than any takes, and less than pytest gives a test."""

TIMING = {"seconds", "images_per_second"}


@dataclass(frozen=True)
class Kill:
    """When a victim is killed: at its n-th call to the disk, in the middle of that call, or at a moment."""

    at_call: int = 0
    partly: bool = False
    after_s: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a trial happens: a folder of its own, and what all trials share.

    One checkpoint is kept, so that losing it would be noticed.
    """

    experiments: Path
    dataset: Path
    keep_checkpoints: int = 1
    shards: int = 1

    @property
    def run_folder(self) -> Path:
        """The run folder of the trial."""
        return self.build_settings(resume=False).run_folder

    def build_settings(self, *, resume: bool) -> RunSettings:
        """Build the settings of the tiny run."""
        values = VALUES | {"keep_checkpoints": self.keep_checkpoints, "shards": self.shards}
        return make_settings(self.experiments, self.dataset, resume=resume, **values)


class Child:
    """A forked process that calls a function; its answer, or the trace of its error, comes back through a pipe.

    One that hangs shows where, and ends.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._reader)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                faulthandler.register(signal.SIGALRM, chain=True)  # without a thread: a child may fork, too
                signal.alarm(LONGEST_S)
                with os.fdopen(writer, "wb") as pipe:
                    try:
                        pickle.dump(function(*arguments), pipe)
                        status = 0
                    except BaseException:
                        pickle.dump(traceback.format_exc(), pipe)
            finally:
                os._exit(status)
        os.close(writer)

    def has_ended(self) -> bool:
        """Say whether it has ended, and not been waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> tuple[int, Any]:
        """Wait for the end; return the exit status (-9 after SIGKILL) and the answer, trace or why it was ended.

        The answer is None if something else killed it.
        """
        with os.fdopen(self._reader, "rb") as pipe:
            raw = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status == -signal.SIGALRM:
            return status, f"it hung for {LONGEST_S} s; standard error says where"
        return status, pickle.loads(raw) if status >= 0 else None


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a child and return its answer.

    Raises:
        AssertionError: it raised; the message has its trace.
    """
    status, answer = Child(function, *arguments).wait()
    if status != 0:
        raise AssertionError(f"exit status {status}: {answer}")
    return answer


def is_harmless(name: str, path: Path) -> bool:
    """Say whether a call to the disk removes a writer's emptied folder, which costs nobody anything if it fails."""
    return name == "remove" and path.name.startswith(TEMPORARY_PREFIX)


def check_no_other_thread() -> None:
    """Assert that this process can fork."""
    num_threads = len(os.listdir("/proc/self/task"))
    assert num_threads == 1, f"{num_threads} threads: a fork would copy one of them and the locks of all"


def kill_process() -> None:
    """End this process as a power failure would: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(place: Place, kill: Kill) -> list[tuple[str, Path]]:
    """Begin the tiny run, or go on with it, and be killed; return the calls to the disk if that did not happen."""
    disk = FaultyDisk(kill_process, kill.at_call, partly=kill.partly)
    run(place.build_settings(resume=place.run_folder.exists()), disk=disk)
    return disk.calls


def train_and_kill(place: Place, kill: Kill) -> bool:
    """Train in a child and see to it that it is killed; return whether it was: a random moment can come too late."""
    victim = Child(train, place, kill)
    if kill.after_s:
        wait_for_run_folder(place, victim)
        time.sleep(kill.after_s)
        os.kill(victim.pid, signal.SIGKILL)
    status, answer = victim.wait()
    if status not in (0, -signal.SIGKILL):
        raise AssertionError(f"exit status {status}: {answer}")
    return status == -signal.SIGKILL


def wait_for_run_folder(place: Place, child: Child) -> None:
    """Wait until a child has made the run folder, or has ended."""
    while not place.run_folder.exists() and not child.has_ended():
        time.sleep(0.001)


def wait_for_step(place: Place, step: int, child: Child) -> None:
    """Wait until a run has taken this step, or its child has ended."""
    chain = place.run_folder / CHAIN
    while not child.has_ended():
        if chain.exists() and any(line["step"] >= step for line in read_lines(chain)):
            return
        time.sleep(0.001)


def examine(place: Place, reference: Path) -> int:
    """Assert that every file under a final name is whole and true; return the newest checkpoint's step, 0 for none."""
    folder = place.run_folder
    if not folder.exists():
        return 0
    chain = {line["step"]: line for line in read_chain(reference)}
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    steps = checkpoints.list_steps()
    for step in steps:
        state = checkpoints.load(step)
        assert state["step"] == step and state["chain_head"] == chain[step]["digest"]
        for name, digest in compute_tensor_digests(state["classifier"]).items():
            assert digest.startswith(chain[step]["tensors"][name]), f"{name} is another at step {step}"
    for name in (METRICS, CHAIN):
        if (folder / name).exists():
            written, expected = (read_lines(path / name) for path in (folder, reference))
            assert written == expected[: len(written)], f"{name} has other lines than the reference"
    for name, read in ((RECORD, read_record), (EVALUATION, read_evaluation), (PREDICTIONS, read_predictions)):
        if (folder / name).exists():
            read(folder)
    if (folder / MODEL).exists():
        weights_digest = compute_weights_digest(load_model(folder / MODEL).classifier)
        assert weights_digest == read_manifest(reference)["weights_digest"]
    if is_finished(folder):
        assert find_changed_files(folder) == []
    return steps[-1] if steps else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines but the last one if it is torn, without what measures time."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def resume_and_compare(place: Place, reference: Path) -> int:
    """Examine the run, go on with it to its end, and assert that it is the reference to the bit.

    Returns the step of the newest checkpoint that was there.
    """
    step = examine(place, reference)
    run(place.build_settings(resume=place.run_folder.exists()))
    compare(place.run_folder, reference)
    return step


def compare(folder: Path, reference: Path) -> None:
    """Assert that a finished run is the reference to the bit, and that nothing is left over in its folder."""
    manifest, expected = read_manifest(folder), read_manifest(reference)
    for key in ("weights_digest", "chain_head"):
        assert manifest[key] == expected[key], f"{key} is not that of the reference"
    assert find_changed_files(folder) == []
    assert compute_weights_digest(load_model(folder / MODEL).classifier) == expected["weights_digest"]
    for name in (CHAIN, EVALUATION, PREDICTIONS):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), f"{name} is not that of the reference"
    assert len(read_epochs(folder)) == NUM_EPOCHS
    assert read_lines(folder / METRICS) == read_lines(reference / METRICS)
    names, expected_names = ({path.relative_to(top) for path in top.rglob("*")} for top in (folder, reference))
    assert names == expected_names, f"left over or missing: {sorted(map(str, names ^ expected_names))}"


@dataclass(frozen=True)
class Trial:
    """What came of a trial that went well.

    Attributes:
        kind: call, half a call, or random.
        num_kills: how often the run was killed.
        step: of the newest checkpoint that the first kill left, 0 where it left none.
    """

    kind: str
    num_kills: int
    step: int


def try_call(place: Place, reference: Path, kill: Kill) -> Trial:
    """Kill a run at a call to the disk; examine what that left, go on with it and compare its end."""
    assert train_and_kill(place, kill), "the run came to its end: nothing killed it"
    step = call(resume_and_compare, place, reference)
    shutil.rmtree(place.experiments)
    return Trial("half a call" if kill.partly else "call", 1, step)


def try_moments(place: Place, reference: Path, seed: str, longest_s: float) -> Trial:
    """Kill a run once or twice at random moments, else as `try_call`."""
    generator = random.Random(seed)
    num_kills = generator.randint(1, 2)
    steps: list[int] = []
    while len(steps) < num_kills:
        if train_and_kill(place, Kill(after_s=generator.uniform(0, longest_s))):
            steps.append(call(examine, place, reference))
            assert steps == sorted(steps), f"a checkpoint that had been saved was lost: {steps}"
        elif steps:
            break  # resumed, it came to its end before the next moment
        else:
            shutil.rmtree(place.experiments)
    call(resume_and_compare, place, reference)
    shutil.rmtree(place.experiments)
    return Trial("random", len(steps), steps[0])


def train_as_rank(place: Place, rank: int, size: int, port: int) -> None:
    """Train as one process of several, as torchrun starts them, with short limits on what to wait for."""
    ranks.TIMEOUT_S, ranks.GRACE_S = 5, 0
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    with ranks.open_ranks("cpu") as group:
        if rank == 0:
            run(place.build_settings(resume=place.run_folder.exists()), ranks=group)
        else:
            with scratch_folder() as scratch:
                run(place_aside(place.build_settings(resume=False), scratch), ranks=group)


def try_ranks(place: Place, reference: Path, seed: str, num_kills: int) -> list[int]:
    """Train in one to four processes, kill one of them so many times, and go on with another number of them.

    Returns the step of the newest checkpoint after each kill.
    """
    generator = random.Random(seed)
    steps: list[int] = []
    while True:
        size = generator.randint(1, 4)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        children = [Child(train_as_rank, place, rank, size, port) for rank in range(size)]
        if len(steps) < num_kills:
            if generator.random() < 0.2:
                time.sleep(generator.uniform(0, 0.5))  # while they find each other, too
            else:
                wait_for_step(place, generator.randint(min(steps[-1] + 1, 24) if steps else 1, 24), children[0])
            os.kill(children[generator.randrange(size)].pid, signal.SIGKILL)
        outcomes = [child.wait() for child in children]
        if not any(status for status, _ in outcomes):
            break
        assert len(steps) < num_kills, outcomes
        for status, answer in outcomes:
            assert status in (0, -signal.SIGKILL) or "RankError" in answer, answer
        steps.append(call(examine, place, reference))
    call(compare, place.run_folder, reference)
    shutil.rmtree(place.experiments)
    return steps


def train_unharmed(place: Place) -> tuple[list[tuple[str, Path]], float]:
    """Train by the same way as a victim; return the calls to the disk, and the seconds from the run folder on."""
    child = Child(train, place, Kill())
    wait_for_run_folder(place, child)
    started = time.perf_counter()
    status, calls = child.wait()
    assert status == 0, calls
    return calls, time.perf_counter() - started


class Campaign:
    """Processes that fork victims, a reference that nobody killed, and a folder for each trial.

    Attributes:
        reference: the run folder of the reference.
        calls: name and path of each of the calls to the disk that the reference made, in their order.
        longest_s: how long it took from the moment that its run folder was there.
    """

    def __init__(self, scratch: Path, num_workers: int) -> None:
        self._scratch = scratch
        self._num_places = 0
        self._dataset = scratch / "dataset"
        write_tiny_dataset(self._dataset, num_train=110, num_test=40)
        variable = ("OPENBLAS_NUM_THREADS", "1")  # set before numpy is imported, which starts threads otherwise
        self._pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), os.putenv, variable)
        self._picture: bytes | None = None
        place = self.make_place()
        self.reference = place.run_folder
        self.submit(train_unharmed, place).result()
        self._picture = (self.reference / FIGURE).read_bytes()
        self.calls, self.longest_s = self.submit(train_unharmed, self.make_place()).result()

    def make_place(self, keep_checkpoints: int = 1, shards: int = 1) -> Place:
        """Make a place for one more trial."""
        self._num_places += 1
        return Place(self._scratch / f"{self._num_places:05}", self._dataset, keep_checkpoints, shards)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in a process that may fork victims, and must not compute anything itself."""
        return self._pool.submit(_call_prepared, self._picture, function, *arguments)

    def list_kills(self) -> list[Kill]:
        """List a kill at each call to the disk, in their order, and where one can be cut, one in its middle."""
        kills = []
        for number, (name, path) in enumerate(self.calls, start=1):
            kills.append(Kill(at_call=number))
            is_folder = name == "remove" and path.suffix == "" and not is_harmless(name, path)  # whose name has none
            if name in ("write_file", "append") or is_folder:
                kills.append(Kill(at_call=number, partly=True))
        return kills

    def kill_at_calls(self, kills: Sequence[Kill]) -> list[Future[Trial]]:
        """Kill a run at each of these calls to the disk."""
        return [self.submit(try_call, self.make_place(), self.reference, kill) for kill in kills]

    def kill_at_random(self, num_trials: int, seed: int = 0) -> list[Future[Trial]]:
        """Kill runs at random moments."""
        return [
            self.submit(try_moments, self.make_place(), self.reference, f"{seed} {number}", self.longest_s)
            for number in range(num_trials)
        ]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _call_prepared(picture: bytes | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function after importing what a run imports on its way, so that no victim has to.

    To draw the picture takes more than half of a tiny run, and does nothing to the disk: each writes the reference's.
    """
    for name in ("torch._inductor", "torchmetrics", "alembic.command", "sqlalchemy.dialects.sqlite"):
        importlib.import_module(name)
    PIL.Image.preinit()
    tqdm.get_lock()  # type: ignore[no-untyped-call]  # a semaphore that a child made would outlive it
    if picture is not None:
        setattr(figures, "draw_run_figure", lambda *_: picture)
    check_no_other_thread()
    gc.freeze()  # a collection in a child would touch, and so copy, all that was imported
    return function(*arguments)
