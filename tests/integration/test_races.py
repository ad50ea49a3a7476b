"""Several processes at one name: no reader finds a part, no loser a strange error, and nothing temporary is left.

`python -m benchmarks.races` does the same many thousand times.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.races import RACES, Home, race, read_file, read_folder, write_file_often, write_folder_often

NUM_KILLS = 8


@pytest.mark.parametrize(
    ("write", "read", "num_writes"),
    [(write_file_often, read_file, 1000), (write_folder_often, read_folder, 300)],
    ids=["file", "folder"],
)
def test_no_reader_finds_a_part_and_nothing_is_left(
    write: Callable[..., None], read: Callable[[Path], bool], num_writes: int, tmp_path: Path
) -> None:
    tally = race(write, read, tmp_path / "name", num_writes, num_kills=NUM_KILLS)
    assert tally.num_writes >= num_writes and tally.num_reads > 100
    assert (tally.num_torn, tally.left) == (0, [])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, sample_dataset: Path, published_run: Path) -> Home:
    folder = tmp_path_factory.mktemp("races")
    dataset = shutil.copytree(sample_dataset, folder / "dataset")
    run = shutil.copytree(published_run.parent, folder / "runs" / "first", ignore=shutil.ignore_patterns("published"))
    return Home(folder, dataset, run, shutil.copytree(published_run, folder / "model"))


@pytest.mark.parametrize("name", RACES)
def test_commands_at_once_succeed_or_say_who_was_first(name: str, home: Home) -> None:
    RACES[name](home)
    assert home.list_temporary() == []
