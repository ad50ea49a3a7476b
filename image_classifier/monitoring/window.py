"""The window for drift tests: the latest captured images that a model answered."""

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
    """Which captured images are taken for a model's.

    Attributes:
        name: of the model, for messages.
        digests: sha256 of its ONNX files; all images must be of one of them.
        version: takes the images of this version, whatever their digest, and leaves out others; None for none.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    digests: frozenset[str]
    version: str | None = None

    def choose(self, captured: Captured) -> Captured | None:
        """Choose the images of a file that are the model's; None if there are none.

        Raises:
            DataError: others are among them, and no version chooses; or they are of other classes or of another size.
        """
        if self.version is not None:
            rows = np.flatnonzero(np.array(captured.model_versions) == self.version)
            if not len(rows):
                return None
            captured = select(captured, rows)
        elif captured.facts.model_digest not in self.digests:
            versions = ", ".join(sorted(set(captured.model_versions)))
            raise DataError(
                f"{captured.path} has answers of another model than {self.name}, of version {versions}; "
                "--model_version selects one version, --since a time"
            )
        if captured.facts.classes != self.classes or captured.facts.image_size != self.image_size:
            raise DataError(
                f"{captured.path} has answers for other classes, or images of another size, than {self.name}; name the "
                "model that was served"
            )
        if not ((captured.probabilities >= 0) & (captured.probabilities < 1.001)).all():  # their sums are rounded
            raise DataError(f"{captured.path} has invalid probabilities; remove it, or choose the time by --since")
        return captured


def describe_served(folder: Path, published: Published, image_size: int, version: str | None = None) -> Served:
    """Describe which captured images are those of a published model."""
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
        broken: files that were left out.
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
        """Time of the first image, in whole seconds by UTC."""
        return str(np.datetime_as_string(self.times[0], "s"))

    @property
    def last(self) -> str:
        """Time of the last image."""
        return str(np.datetime_as_string(self.times[-1], "s"))


def load_window(
    place: str, served: Served, num_images: int, *, since: datetime | None = None, until: datetime | None = None
) -> Window:
    """Load the latest captured images of a model, so many at most; hours before those are not read.

    Raises:
        DataError: there are fewer than `MIN_IMAGES`, or answers of another model among them.
        SettingsError: pyarrow is not installed, or what fsspec needs for the place.
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
    """Keep the last images of files, so many at most, with no more files in memory than they are in."""
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
    """List the hours of a place that have captures, the latest first.

    Raises:
        DataError: the place cannot be read, or holds no captures of this time.
    """
    paths = read_captures(place, since=since, until=until).list_paths()
    hours = set()
    for path in paths:
        try:
            hours.add(datetime.strptime(path[:23], "date=%Y-%m-%d/hour=%H").replace(tzinfo=UTC))
        except ValueError:  # no hour: the file is found broken with those of any other
            continue
    return sorted(hours, reverse=True)


def iterate_captured(place: str, served: Served, since: datetime | None, until: datetime | None) -> Iterator[Captured]:
    """Iterate over all captured images of a model, file by file, in the order of their times.

    Raises:
        DataError: as `load_window`, but for few images.
    """
    for part in map(served.choose, read_captures(place, since=since, until=until)):
        if part is not None:
            yield part
