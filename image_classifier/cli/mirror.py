"""A run copied to another place: `--mirror`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from image_classifier.errors import RemoteError, RunError, SettingsError, StorageError
from image_classifier.files import parse_json
from image_classifier.progress import say
from image_classifier.remote.cache import localize
from image_classifier.remote.store import Patience
from image_classifier.remote.target import Target
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings
from image_classifier.storage import DISK, locked_folder, storage_error, written_beside
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.layout import BOARD, CHECKPOINTS, PROFILE, RECORD

REPLACEABLE = (CHECKPOINTS, BOARD, PROFILE)
"""What may be in an unfinished copy and not in the run any more."""

_ON_THE_WAY = Patience(num_tries=2)  # a training waits for it

logger = logging.getLogger(__name__)


@contextmanager
def open_mirror(settings: RunSettings) -> Iterator[Reporter]:
    """Yield a reporter that copies checkpoints if the settings ask for it; at the end the finished run follows.

    A place that cannot be written to, or holds another run of this name, stops the run before the first step. One that
    is lost on the way does not.

    Raises:
        RemoteError, StorageError: before the first step or after the last.
        SettingsError: the place can only be read, or what reaches it is not installed.
    """
    if settings.mirror is None:
        yield Reporter()
        return
    target = Target(get_copy(settings), "mirror")
    if target.overlaps(settings.run_folder):
        raise SettingsError("--mirror takes another folder than --experiments_folder: the copy would be the run itself")
    check_record(settings.run_folder, target)
    if not is_finished(settings.run_folder):
        target.probe()
    yield Mirror(settings) if settings.mirror_checkpoints else Reporter()
    try:
        target.copy(settings.run_folder, replaceable=REPLACEABLE)
    except (RemoteError, StorageError) as error:
        raise RemoteError(
            f"{settings.run_folder} is finished and whole; its copy is not: {error}; --resume copies it"
        ) from error
    say(f"copied to {target}")


class Mirror(Reporter):
    """Copies the run after each checkpoint, as far as it has come."""

    def __init__(self, settings: RunSettings) -> None:
        self._run = settings.run_folder
        self._target = Target(get_copy(settings), "mirror", _ON_THE_WAY)

    def checkpoint(self, step: int) -> None:
        try:
            self._target.copy(self._run, replaceable=REPLACEABLE)
        except (RemoteError, StorageError) as error:
            logger.warning("the checkpoint of step %d was not copied, and the training goes on: %s", step, error)


def get_copy(settings: RunSettings) -> Path:
    """Get the place of the run's copy."""
    assert settings.mirror is not None
    return settings.mirror / settings.experiment_name / settings.run_name


def check_record(run: Path, target: Target) -> None:
    """Check that what is at a place, if anything, began as the run did that is here.

    Raises:
        RemoteError: it is another run, or there is none here.
    """
    theirs = target.read(RECORD)
    if theirs is None:
        return
    ours = (run / RECORD).read_bytes() if (run / RECORD).is_file() else None
    if ours is None or _get_start(ours) != _get_start(theirs):
        raise RemoteError(f"{target} holds another run; choose another --run_name, or continue that one with --resume")


def _get_start(record: bytes) -> object:
    try:
        return parse_json(record)["started_at"]
    except (ValueError, KeyError, TypeError):
        return None


def take_over(settings: RunSettings) -> None:
    """Fetch the run that is to be resumed from its mirror, if it is not here.

    Raises:
        RunError: it is not there either.
        RemoteError, StorageError: it cannot be fetched; nothing is left here.
    """
    run = settings.run_folder
    if settings.mirror is None or (run / RECORD).exists():
        return
    target = Target(get_copy(settings), "mirror")
    if target.read(RECORD) is None:
        raise RunError(f"there is no run {run} to resume, and none at {target}; leave out --resume to start it")
    copy = localize(get_copy(settings))
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(run.parent):
            if not (run / RECORD).exists():  # another process of this training may have fetched it
                with written_beside(run, replace=False) as temporary:
                    shutil.copytree(copy, temporary)
                    DISK.sync_all()
    except OSError as error:
        raise storage_error(run, error) from error
