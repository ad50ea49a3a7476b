"""Runs that are killed, whose files are damaged, whose disk refuses: nothing is lost, and they end with equal bits."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_classifier.errors import Interrupted, RunError, StorageError
from image_classifier.experiment import run
from image_classifier.reporter import Reporter
from image_classifier.storage import TEMPORARY_PREFIX, FaultyDisk
from image_classifier.tracking.checking import find_changed_files
from image_classifier.tracking.layout import CHAIN, MANIFEST, METRICS, list_run_files
from image_classifier.training.loop import Step
from tests.conftest import report_lack
from tests.crash import (
    Campaign,
    Kill,
    Place,
    call,
    compare,
    examine,
    is_harmless,
    read_lines,
    resume_and_compare,
    train_and_kill,
    train_unharmed,
    try_ranks,
)

NUM_RANDOM_TRIALS = 40
NUM_TRIALS_KILLED_AGAIN = 8  # calls that a run makes while it goes on: it removes, cuts, and writes its record


# Kills. The number of these trials is a promise of the project: at least 200.


def test_the_control_comes_to_its_end_because_nothing_kills_it(campaign: Campaign) -> None:
    place = campaign.make_place()
    assert campaign.submit(train_and_kill, place, Kill()).result() is False
    campaign.submit(call, compare, place.run_folder, campaign.reference).result()
    assert len(campaign.list_kills()) + NUM_RANDOM_TRIALS + NUM_TRIALS_KILLED_AGAIN >= 200


@pytest.mark.parametrize("partly", [False, True])
def test_a_run_killed_at_any_call_to_the_disk_goes_on_and_ends_with_the_same_bits(
    partly: bool, campaign: Campaign
) -> None:
    kills = [kill for kill in campaign.list_kills() if kill.partly == partly]
    if not partly:
        assert [kill.at_call for kill in kills] == list(range(1, len(campaign.calls) + 1))
    trials = [future.result() for future in campaign.kill_at_calls(kills)]
    steps = [trial.step for trial in trials]
    assert steps == sorted(steps), "a checkpoint that had been saved was lost"
    assert sorted(set(steps)) == [0, 10, 20, 26]


def test_a_run_killed_at_random_moments_goes_on_and_ends_with_the_same_bits(campaign: Campaign) -> None:
    trials = [future.result() for future in campaign.kill_at_random(NUM_RANDOM_TRIALS)]
    assert all(trial.num_kills >= 1 for trial in trials)
    assert sum(trial.num_kills for trial in trials) > NUM_RANDOM_TRIALS
    assert len({trial.step for trial in trials}) > 1, "all were killed in one and the same part of the run"


def kill_twice(place: Place, reference: Path, first: Kill, second: Kill) -> None:
    assert train_and_kill(place, first)
    step = call(examine, place, reference)
    assert train_and_kill(place, second)
    assert call(resume_and_compare, place, reference) == step, "a checkpoint was lost, or the second kill came late"


def test_a_run_killed_again_while_it_goes_on_ends_with_the_same_bits(campaign: Campaign) -> None:
    places = [(path.parent.name, path.name) for _, path in campaign.calls]
    in_a_save = Kill(at_call=places.index(("step-00000020", "state.pth")) + 1, partly=True)
    futures = [
        campaign.submit(kill_twice, campaign.make_place(), campaign.reference, in_a_save, Kill(at_call=number))
        for number in range(1, NUM_TRIALS_KILLED_AGAIN + 1)
    ]
    for future in futures:
        future.result()


def test_runs_in_changing_numbers_of_processes_survive_fifty_kills(campaign: Campaign) -> None:
    place = campaign.make_place(shards=4)
    campaign.submit(train_unharmed, place).result()
    futures = [
        campaign.submit(try_ranks, campaign.make_place(shards=4), place.run_folder, f"ranks {number}", 5)
        for number in range(12)
    ]
    kills = [future.result() for future in futures]
    assert sum(map(len, kills)) >= 50
    assert all(steps == sorted(steps) for steps in kills), "a checkpoint that had been saved was lost"
    assert {0, 10, 20} <= {step for steps in kills for step in steps}


# Damage of an interrupted run.


def interrupt(place: Place) -> None:
    """Train, as a child, up to step 22 and save: with checkpoints after the steps 10, 20 and 22."""
    steps: list[int] = []

    class Counter(Reporter):
        def step(self, step: Step) -> None:
            steps.append(step.number)

    with pytest.raises(Interrupted):
        run(place.build_settings(resume=False), reporter=Counter(), should_stop=lambda: steps[-1] == 22)


class _BeforeEvaluation(Exception):
    pass


def resume_training(place: Place, reference: Path) -> tuple[int, list[str]]:
    """Go on, as a child, up to the evaluation; return the step before the first one, and the warnings."""
    warnings: list[str] = []
    first_steps: list[int] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    class Witness(Reporter):
        def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
            first_steps.append(first_step)

        def evaluate(self, num_images: int) -> None:
            raise _BeforeEvaluation

    logging.getLogger("image_classifier").addHandler(Collector())
    with pytest.raises(_BeforeEvaluation):
        run(place.build_settings(resume=True), reporter=Witness())
    assert (place.run_folder / CHAIN).read_bytes() == (reference / CHAIN).read_bytes()
    assert read_lines(place.run_folder / METRICS) == read_lines(reference / METRICS)
    return first_steps[0], warnings


@pytest.fixture(scope="module")
def interrupted(campaign: Campaign) -> Place:
    place = campaign.make_place(keep_checkpoints=3)
    campaign.submit(call, interrupt, place).result()
    return place


def list_damages(content: bytes) -> list[bytes]:
    """The content cut at each sixteenth of its length, filled with zeros, and with one bit flipped at each quarter."""
    lengths = [len(content) * part // 16 for part in range(16)]
    flipped = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in lengths[::4]]
    return [*(content[:length] for length in lengths), bytes(len(content)), *flipped]


def damage_and_resume(campaign: Campaign, interrupted: Place, name: str) -> list[tuple[int, list[str], Path]]:
    """Damage one file of an interrupted run in each way, a copy of the run for each, and go on with all of them."""
    trials = []
    for damaged in list_damages((interrupted.run_folder / name).read_bytes()):
        place = campaign.make_place(keep_checkpoints=3)
        shutil.copytree(interrupted.experiments, place.experiments)
        (place.run_folder / name).write_bytes(damaged)
        future = campaign.submit(call, resume_training, place, campaign.reference)
        trials.append((place.run_folder, future))
    return [(*future.result(), folder) for folder, future in trials]


def test_an_interrupted_run_that_nobody_damaged_goes_on_without_a_warning(
    campaign: Campaign, interrupted: Place
) -> None:
    place = campaign.make_place(keep_checkpoints=3)
    shutil.copytree(interrupted.experiments, place.experiments)
    assert campaign.submit(call, resume_training, place, campaign.reference).result() == (22, [])


@pytest.mark.parametrize("name", ["state.pth", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    name: str, campaign: Campaign, interrupted: Place
) -> None:
    for first_step, warnings, folder in damage_and_resume(campaign, interrupted, f"checkpoints/step-00000022/{name}"):
        assert first_step == 20
        assert len(warnings) == 1 and "step-00000022 is damaged" in warnings[0] and "it was renamed to" in warnings[0]
        assert (folder / "checkpoints" / "bad-step-00000022").is_dir()


@pytest.mark.parametrize("name", [METRICS, CHAIN])
def test_lost_or_changed_lines_are_noticed_and_written_again(name: str, campaign: Campaign, interrupted: Place) -> None:
    for first_step, warnings, _ in damage_and_resume(campaign, interrupted, name):
        assert first_step < 22 and len(warnings) >= 1
        assert all(f"{name} has lost or changed lines" in warning for warning in warnings)


def test_a_torn_last_line_is_cut_off(campaign: Campaign, interrupted: Place) -> None:
    place = campaign.make_place(keep_checkpoints=3)
    shutil.copytree(interrupted.experiments, place.experiments)
    for name in (METRICS, CHAIN):
        with open(place.run_folder / name, "ab") as file:
            file.write(b'{"step": 23, "train_lo')
    assert campaign.submit(call, resume_training, place, campaign.reference).result() == (22, [])


def test_a_run_without_a_good_checkpoint_begins_again(campaign: Campaign, interrupted: Place) -> None:
    place = campaign.make_place(keep_checkpoints=3)
    shutil.copytree(interrupted.experiments, place.experiments)
    for path in place.run_folder.glob("checkpoints/*/state.pth"):
        path.write_bytes(b"")
    first_step, warnings = campaign.submit(call, resume_training, place, campaign.reference).result()
    assert (first_step, len(warnings)) == (0, 3)


# Damage of a finished run.


def test_any_damage_to_a_file_of_a_finished_run_is_found_and_the_file_named(campaign: Campaign, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(campaign.reference, folder)
    names = list_run_files(folder)
    assert {"run.json", "metrics.jsonl", "digests.jsonl", "model.pth", "metrics.png"} < set(names)
    assert "checkpoints/step-00000026/state.pth" in names
    for name in names:
        content = (folder / name).read_bytes()
        for damaged in list_damages(content):
            (folder / name).write_bytes(damaged)
            assert find_changed_files(folder) == [name]
        (folder / name).unlink()
        assert find_changed_files(folder) == [name]
        (folder / name).write_bytes(content)
    assert find_changed_files(folder) == []


def test_any_damage_to_the_manifest_itself_is_found(campaign: Campaign, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(campaign.reference, folder)
    content = (folder / MANIFEST).read_bytes()
    for position in range(len(content)):
        for damaged in (
            content[:position],
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :],
        ):
            if damaged.rstrip() == content.rstrip():  # all but the last line's end
                continue
            (folder / MANIFEST).write_bytes(damaged)
            with pytest.raises(RunError, match="manifest.json"):
                find_changed_files(folder)


# A disk that refuses.


def train_until_refused(place: Place, harm: Callable[[Place], None], at_step: int) -> str:
    """Train, as a child, do harm at a step, and return the message of the error that this leads to."""

    class Harm(Reporter):
        def step(self, step: Step) -> None:
            if step.number == at_step:
                harm(place)

    with pytest.raises(StorageError) as caught:
        run(place.build_settings(resume=False), reporter=Harm())
    return str(caught.value)


def check_refusal(message: str, place: Place, words: str) -> None:
    """The error is one line that names a path and the remedy, and nothing that was begun is left."""
    assert "\n" not in message and str(place.run_folder) in message and words in message, message
    left = list(place.experiments.rglob(f"{TEMPORARY_PREFIX}*"))
    assert left == [], f"left over after {message}: {left}"


def limit_files(place: Place) -> None:
    """Let no file grow beyond half of what a checkpoint takes: a save fails in its middle, with EFBIG."""
    (state,) = place.run_folder.glob("checkpoints/*/state.pth")
    resource.setrlimit(resource.RLIMIT_FSIZE, (state.stat().st_size // 2, resource.RLIM_INFINITY))


def try_limit(place: Place, reference: Path) -> None:
    message = call(train_until_refused, place, limit_files, 15)
    check_refusal(message, place, "checkpoints/step-00000020: File too large; raise the limit")
    assert call(resume_and_compare, place, reference) == 10


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(campaign: Campaign) -> None:
    campaign.submit(try_limit, campaign.make_place(), campaign.reference).result()


def take_permission(place: Place) -> None:
    """Take away the right to write into the run folder: from its files, and, as those do not bind root, from root."""
    for path in (place.run_folder, *place.run_folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    if os.geteuid() == 0:
        os.seteuid(65534)


def try_permission(place: Place, reference: Path) -> None:
    message = call(train_until_refused, place, take_permission, 15)
    check_refusal(message, place, "Permission denied; choose a writable folder")
    for path in (place.run_folder, *place.run_folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    assert call(resume_and_compare, place, reference) == 10


def test_a_folder_without_permission_leaves_the_checkpoint_before(campaign: Campaign) -> None:
    campaign.submit(try_permission, campaign.make_place(), campaign.reference).result()


MS_RDONLY, MS_REMOUNT = 1, 32
CLONE_NEWNS = 0x20000


def mount(target: Path, flags: int, options: str) -> None:
    """Mount a file system in memory; raise where this process may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(target), b"tmpfs", ctypes.c_ulong(flags), options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def mount_small_disk(place: Place) -> None:
    """Mount a disk of its own for the trial, which this process and its children alone see."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 14 | 1 << 18), None) != 0:  # keep what is mounted private
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    place.experiments.mkdir()
    mount(place.experiments, 0, "size=4m")


def require_mounts(campaign: Campaign) -> None:
    """Skip the test where file systems cannot be mounted; with CI=true fail it."""
    try:
        campaign.submit(call, mount_small_disk, campaign.make_place()).result()
    except AssertionError as error:
        report_lack(f"this process may not mount a file system: {error}")


def fill_disk(place: Place) -> None:
    """Leave half as much room as a checkpoint takes."""
    (state,) = place.run_folder.glob("checkpoints/*/state.pth")
    status = os.statvfs(place.experiments)
    room = status.f_bavail * status.f_frsize - state.stat().st_size // 2
    (place.experiments / "filler").write_bytes(bytes(room))


def remount_read_only(place: Place) -> None:
    mount(place.experiments, MS_REMOUNT | MS_RDONLY, "size=4m")


def try_full_disk(place: Place, reference: Path) -> None:
    mount_small_disk(place)
    message = call(train_until_refused, place, fill_disk, 15)
    check_refusal(message, place, "checkpoints/step-00000020: No space left on device; free some space")
    (place.experiments / "filler").unlink()
    assert call(resume_and_compare, place, reference) == 10


def try_read_only_disk(place: Place, reference: Path) -> None:
    mount_small_disk(place)
    message = call(train_until_refused, place, remount_read_only, 15)
    check_refusal(message, place, "Read-only file system; choose a writable folder")
    mount(place.experiments, MS_REMOUNT, "size=4m")
    assert call(resume_and_compare, place, reference) == 10


@pytest.mark.parametrize("trial", [try_full_disk, try_read_only_disk])
def test_a_disk_that_is_full_or_read_only_leaves_the_checkpoint_before(
    trial: Callable[[Place, Path], None], campaign: Campaign
) -> None:
    require_mounts(campaign)
    campaign.submit(call, trial, campaign.make_place(), campaign.reference).result()


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_on_faulty_disk(place: Place, at_call: int) -> str:
    with pytest.raises(StorageError) as caught:
        run(place.build_settings(resume=False), disk=FaultyDisk(refuse, at_call, partly=True))
    return str(caught.value)


def try_refusal(place: Place, reference: Path, at_call: int) -> int:
    message = call(train_on_faulty_disk, place, at_call)
    check_refusal(message, place, "No space left on device; free some space")
    step: int = call(resume_and_compare, place, reference)
    return step


def test_a_disk_that_refuses_a_call_is_reported_in_one_line_and_loses_nothing(campaign: Campaign) -> None:
    harmful = [number for number, call in enumerate(campaign.calls, start=1) if not is_harmless(*call)]
    calls = harmful[::8]  # each in turn: tests/unit/tracking
    futures = [campaign.submit(try_refusal, campaign.make_place(), campaign.reference, number) for number in calls]
    steps = [future.result() for future in futures]
    assert steps == sorted(steps) and set(steps) == {0, 10, 20, 26}
