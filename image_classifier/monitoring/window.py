"""Loads the window for drift tests: the latest captured images of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.capture.files import BrokenCapture, Captured, read_captures, select
from image_classifier.errors import DataError
from image_classifier.monitoring.drift import MIN_IMAGES
from image_classifier.published.folder import INT8_MODEL, MODEL, Published


@dataclass(frozen=True)
class Served:
    """Selects the captured images of a model.

    Attributes:
        name: of the model, for messages.
        digests: sha256 of its ONNX files, one of which must have computed the images.
        version: select images of this version instead, and skip others.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    digests: frozenset[str]
    version: str | None = None

    def choose(self, captured: Captured) -> Captured | None:
        """Select the model's images of a file; None if there are none.

        Raises:
            DataError: another model computed them, or their classes or image size differ from the model's.
        """
        if self.version is not None:
            rows = np.flatnonzero(np.array(captured.model_versions) == self.version)
            if not len(rows):
                return None
            captured = select(captured, rows)
        elif captured.facts.model_digest not in self.digests:
            versions = ", ".join(sorted(set(captured.model_versions)))
            raise DataError(
                f"{captured.path} has predictions of another model than {self.name}, of version {versions}; "
                "--model_version selects one version, --since a time"
            )
        if captured.facts.classes != self.classes or captured.facts.image_size != self.image_size:
            raise DataError(
                f"{captured.path} has predictions for other classes, or images of another size, than {self.name}; name "
                "the model that was served"
            )
        if not ((captured.probabilities >= 0) & (captured.probabilities < 1.001)).all():  # tolerates rounding
            raise DataError(f"{captured.path} has invalid probabilities; remove it, or choose the time by --since")
        return captured


def describe_served(folder: Path, published: Published, image_size: int, version: str | None = None) -> Served:
    """Build the selection of a published model's images."""
    described = published.manifest["files"]
    digests = frozenset(described[name]["sha256"] for name in (MODEL, INT8_MODEL) if name in described)
    return Served(str(folder), tuple(published.manifest["classes"]), image_size, digests, version)


@dataclass(frozen=True)
class Window:
    """Captured images in the order of their times.

    Attributes:
        images: uint8 [N, S, S, 3].
        probabilities: float32 [N, C].
        times: datetime64[us] [N], UTC.
        broken: skipped files.
    """

    images: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    times: NDArray[np.datetime64]
    request_ids: list[str]
    broken: tuple[BrokenCapture, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def first(self) -> str:
        """Time of the first image in UTC, to the second."""
        return str(np.datetime_as_string(self.times[0], "s"))

    @property
    def last(self) -> str:
        """Time of the last image, likewise."""
        return str(np.datetime_as_string(self.times[-1], "s"))


def load_window(
    place: str, served: Served, num_images: int, *, since: datetime | None = None, until: datetime | None = None
) -> Window:
    """Load the latest `num_images` captured images of a model, without reading earlier hours.

    Raises:
        DataError: there are fewer than `MIN_IMAGES`, or images of another model.
        SettingsError: pyarrow, or fsspec's library for the place, is not installed.
    """
    parts: deque[Captured] = deque()
    broken: set[BrokenCapture] = set()
    number = 0
    for hour in list_hours(place, since, until):
        begin, end = hour if since is None else max(hour, since), hour + timedelta(hours=1)
        captures = read_captures(place, since=begin, until=end if until is None else min(end, until))
        earlier, earlier_number = _keep_last(map(served.choose, captures), num_images - number)
        parts.extendleft(reversed(earlier))
        number += earlier_number
        broken.update(captures.broken)
        if number == num_images:
            break
    if number < MIN_IMAGES:
        of_version = "" if served.version is None else f" of version {served.version}"
        left_out = f", and {len(broken):,} broken files" if broken else ""
        raise DataError(f"{place} has {number:,} images{of_version}{left_out}; drift needs {MIN_IMAGES}: capture more")
    return Window(
        images=np.concatenate([part.pixels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        times=np.concatenate([part.times for part in parts]),
        request_ids=[name for part in parts for name in part.request_ids],
        broken=tuple(sorted(broken)),
    )


def _keep_last(parts: Iterable[Captured | None], num_images: int) -> tuple[deque[Captured], int]:
    """Return the last `num_images` images of files, and their number, holding only the needed files in memory."""
    kept: deque[Captured] = deque()
    number = 0
    for part in parts:
        if part is None:
            continue
        kept.append(part)
        number += len(part)
        while number - len(kept[0]) >= num_images:
            number -= len(kept.popleft())
    if number > num_images:
        kept[0] = select(kept[0], np.arange(number - num_images, len(kept[0])))
        number = num_images
    return kept, number


def list_hours(place: str, since: datetime | None, until: datetime | None) -> list[datetime]:
    """List the hours of a place that have captures, latest first.

    Raises:
        DataError: the place cannot be read, or has no captures in this period.
    """
    paths = read_captures(place, since=since, until=until).list_paths()
    hours = set()
    for path in paths:
        try:
            hours.add(datetime.strptime(path[:23], "date=%Y-%m-%d/hour=%H").replace(tzinfo=UTC))
        except ValueError:  # not an hour: reading reports the file as broken
            continue
    return sorted(hours, reverse=True)


def iterate_captured(place: str, served: Served, since: datetime | None, until: datetime | None) -> Iterator[Captured]:
    """Yield all captured images of a model, file by file, in the order of their times.

    Raises:
        DataError: as `load_window`, but any number of images is accepted.
    """
    for part in map(served.choose, read_captures(place, since=since, until=until)):
        if part is not None:
            yield part
