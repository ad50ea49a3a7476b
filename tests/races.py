"""Several processes that write one name at once: real ones, with readers beside them, some of them killed.

Whatever they do, a reader must find what one of the writers wrote, whole; a command that loses must say in one line
what happened; and at the end nothing temporary may be left.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from image_classifier.storage import TEMPORARY_PREFIX, is_same, write_atomically, write_folder_atomically
from tests.forked import Command

_SPAWN = multiprocessing.get_context("spawn")
_TEXT = "utf-8"


@dataclass(frozen=True)
class Tally:
    """What came of a race for a file or a folder."""

    num_writes: int
    num_reads: int
    num_torn: int
    num_kills: int
    left: list[str]


def build_content(generator: random.Random) -> bytes:
    """Build content of up to 64 kB that says itself whether it is whole."""
    body = generator.randbytes(generator.choice((0, 100, 5_000, 65_536)))
    return hashlib.sha256(body).hexdigest().encode() + body


def is_whole(content: bytes) -> bool:
    """Say whether content is what `build_content` built."""
    return hashlib.sha256(content[64:]).hexdigest().encode() == content[:64]


def write_file_often(path: Path, num_writes: int, seed: int, count: Synchronized[int]) -> None:
    """Write a file so many times."""
    generator = random.Random(seed)
    for _ in range(num_writes):
        write_atomically(path, build_content(generator))
        with count.get_lock():
            count.value += 1


def write_folder_often(path: Path, num_writes: int, seed: int, count: Synchronized[int]) -> None:
    """Write a folder of two files so many times, each time in the place of the one before."""
    generator = random.Random(seed)
    for _ in range(num_writes):
        files = {name: build_content(generator) for name in ("first", "second")}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        write_folder_atomically(path, {**files, "manifest": json.dumps(digests).encode()}, replace=True)
        with count.get_lock():
            count.value += 1


def read_file(path: Path) -> bool:
    """Read a file once; say whether it was whole."""
    return is_whole(path.read_bytes())


def read_folder(path: Path) -> bool:
    """Open a folder once and read it; say whether it was whole, or was replaced and is being removed."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    contents = {}
    try:
        for name in ("first", "second", "manifest"):
            with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                contents[name] = file.read()
    except FileNotFoundError:
        return not is_same(path, folder)
    finally:
        os.close(folder)
    digests = json.loads(contents.pop("manifest"))
    return bool(digests == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})


def read_until(
    read: Callable[[Path], bool], path: Path, over: Event, num_reads: Synchronized[int], num_torn: Synchronized[int]
) -> None:
    """Read until the writers have come to their end."""
    while not over.is_set():
        whole = read(path)
        with num_reads.get_lock():
            num_reads.value += 1
        if not whole:
            with num_torn.get_lock():
                num_torn.value += 1


def race(
    write: Callable[[Path, int, int, Synchronized[int]], None],
    read: Callable[[Path], bool],
    path: Path,
    num_writes: int,
    *,
    num_writers: int = 4,
    num_readers: int = 2,
    num_kills: int = 0,
) -> Tally:
    """Let writers write one path, readers read it, and more writers be killed at it, at random moments."""
    write(path, 1, 0, _SPAWN.Value("q", 0))
    counts: list[Synchronized[int]] = [_SPAWN.Value("q", 0) for _ in range(4)]
    written, read_often, torn, of_victims = counts
    over = _SPAWN.Event()
    readers = [
        _SPAWN.Process(target=read_until, args=(read, path, over, read_often, torn), daemon=True)
        for _ in range(num_readers)
    ]
    share = -(-num_writes // num_writers)
    writers = [
        _SPAWN.Process(target=write, args=(path, share, seed, written), daemon=True)
        for seed in range(1, num_writers + 1)
    ]
    for process in (*readers, *writers):
        process.start()
    chance = random.Random(0)
    for number in range(num_kills):
        victim = _SPAWN.Process(target=write, args=(path, 10**9, 1000 + number, of_victims), daemon=True)
        victim.start()
        before = of_victims.value
        while of_victims.value == before and victim.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        victim.kill()
        victim.join()
        assert victim.exitcode == -9
        of_victims = _SPAWN.Value("q", 0)  # a killed process may have held its lock
    for process in writers:
        process.join()
    over.set()
    for process in readers:
        process.join()
    assert [process.exitcode for process in (*writers, *readers)] == [0] * (num_writers + num_readers)
    write(path, 1, 0, _SPAWN.Value("q", 0))
    left = sorted(name for name in os.listdir(path.parent) if name != path.name)
    return Tally(written.value, read_often.value, torn.value, num_kills, left)


# Commands.


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Home:
    """A folder of its own for a race: with a data set, and runs that are finished.

    Attributes:
        folder: where all of it lies, the cache too.
        dataset: a small sample set.
        run: a finished run.
        published: a published model of the same run, elsewhere.
    """

    folder: Path
    dataset: Path
    run: Path
    published: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run_at_once(self, *commands: Sequence[str | Path], timeout_s: float = 300) -> list[Answer]:
        """Run commands at once, each in a process of its own, from the folder; return what each answered."""
        variables = {**self.environment, "IMAGE_CLASSIFIER_CACHE": str(self.folder / "cache")}
        started = [
            Command("image_classifier", *words, cwd=self.folder, variables=variables, strict=True) for words in commands
        ]
        answers = [command.finish(timeout_s) for command in started]
        return [Answer(answer.returncode, answer.stdout, answer.stderr) for answer in answers]

    def list_temporary(self) -> list[str]:
        """List what is left over."""
        return sorted(str(path) for path in self.folder.rglob(f"{TEMPORARY_PREFIX}*"))


def expect(answers: Sequence[Answer], words: str = "", *, num_winners: int | None = None) -> None:
    """Assert that commands succeeded, or lost with one line that has these words.

    Args:
        num_winners: how many must succeed; all, where no words are given; at least one otherwise.
    """
    won = [answer for answer in answers if answer.status == 0]
    for answer in answers:
        assert answer.status in (0, 2), answer.stderr
        if answer.status == 2:
            line = answer.stderr.splitlines()[-1]
            assert line.startswith("error: ") and re.search(words, line) and words, answer.stderr
            assert "Traceback" not in answer.stderr
    assert won, [answer.stderr for answer in answers]
    assert len(won) == (len(answers) if not words else num_winners or len(won))


def race_publish(home: Home) -> None:
    """Two publish one run: one does, the other is told."""
    from image_classifier.published.folder import read_published

    shutil.rmtree(home.run / "published", ignore_errors=True)
    words = ("publish", home.run, "--dataset_folder", home.dataset)
    expect(home.run_at_once(words, words), "another process publishes|exists already", num_winners=1)
    read_published(home.run / "published")


def race_publish_with_readers(home: Home) -> None:
    """A run is published anew while others read it: they get the old or the new one."""
    from image_classifier.published.folder import read_published

    shutil.rmtree(home.run / "published", ignore_errors=True)
    shutil.copytree(home.published, home.run / "published")
    image = home.folder / "image.png"
    write_image(image)
    store = ("--experiments_folder", home.folder / "store")
    answers = home.run_at_once(
        ("publish", home.run, "--overwrite", "--dataset_folder", home.dataset),
        *[("predict", home.run / "published", image)] * 3,
        ("registry", "add", home.run, "--name", "model", *store),
        ("registry", "check", home.run),
    )
    expect(answers)
    read_published(home.run / "published")


def race_report(home: Home) -> None:
    """Two write one report: both do."""
    words = ("report", home.run, "--dataset_folder", home.dataset)
    expect(home.run_at_once(words, words))
    assert (home.run / "report.html").read_text(_TEXT).rstrip().endswith("</html>")


def race_resolve(home: Home) -> None:
    """Eight fetch one version into an empty cache: all get it."""
    from image_classifier.published.folder import read_published

    shutil.rmtree(home.folder / "cache", ignore_errors=True)
    store = ("--experiments_folder", home.folder / "store")
    expect(home.run_at_once(("registry", "add", home.published, "--name", "cold", *store)))
    answers = home.run_at_once(*[("registry", "resolve", "cold/1", *store)] * 8)
    expect(answers)
    (folder,) = {answer.stdout.strip() for answer in answers}
    read_published(Path(folder))


def race_train(home: Home) -> None:
    """Two train under one name: one does, the other is told. Two more begin an experiment: both do."""
    from image_classifier.tracking.checking import check_finished, find_changed_files

    experiments = home.folder / "experiments"
    shutil.rmtree(experiments, ignore_errors=True)
    settings = ("--recipe", "notebook", "--num_epochs", "1", "--batch_size", "100", "--num_threads", "1")
    words = ("train", "--experiments_folder", experiments, "--dataset_folder", home.dataset, *settings)
    one = (*words, "--experiment_name", "one", "--run_name", "run")
    expect(home.run_at_once(one, one), "another process is training into|exists already", num_winners=1)
    names = ("first", "second")
    expect(home.run_at_once(*((*words, "--experiment_name", "two", "--run_name", name) for name in names)))
    for run in (experiments / "one" / "run", *(experiments / "two" / name for name in names)):
        check_finished(run)
        assert find_changed_files(run) == []


def race_prepare(home: Home) -> None:
    """Two prepare one data set: it is there, and whole."""
    for folder in (home.folder / "new", home.folder / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    (home.folder / "old").mkdir()
    for name in ("new", "old"):
        words = ("data", "prepare", "--source", "sample", "--dataset_folder", home.folder / name)
        counts = ("--num_train", "200", "--num_test", "100")
        answers = home.run_at_once((*words, *counts), (*words, *counts, "--seed", "1"))
        expect(answers, "another process|has a sample set already|was changed while it was read")
        expect(home.run_at_once(("data", "info", "--dataset_folder", home.folder / name)))


def race_export(home: Home) -> None:
    """Two export to one folder: one does, the other is told."""
    shutil.rmtree(home.folder / "exported", ignore_errors=True)
    words = ("data", "export", home.dataset, "--output", home.folder / "exported")
    expect(home.run_at_once(words, words), "exists already|File exists", num_winners=1)
    expect(home.run_at_once(("data", "info", "--dataset_folder", home.folder / "exported")))


def race_outputs(home: Home) -> None:
    """Two write one file with predictions, a comparison, a sheet: all do."""
    write_image(home.folder / "image.png")
    second = home.folder / "runs" / "second"
    if not second.exists():
        shutil.copytree(home.run, second)
    predict = ("predict", home.published, home.folder / "image.png", "--output", home.folder / "predictions.csv")
    compare = ("compare", home.run, second, "--output", home.folder / "comparison.png")
    info = ("data", "info", "--dataset_folder", home.dataset, "--output", home.folder / "sheet.png")
    expect(home.run_at_once(predict, predict, compare, compare, info, info))
    assert len((home.folder / "predictions.csv").read_text(_TEXT).splitlines()) == 2
    for name in ("comparison.png", "sheet.png"):
        assert (home.folder / name).read_bytes().endswith(b"IEND\xaeB`\x82")


def race_first_use(home: Home) -> None:
    """Four use a registry for the first time: all can, and those that add get numbers of their own."""
    store = ("--experiments_folder", home.folder / "new-store")
    shutil.rmtree(store[1], ignore_errors=True)
    add = ("registry", "add", home.published, "--name", "model", *store)
    answers = home.run_at_once(("registry", "list", *store), add, ("registry", "list", *store), add)
    expect(answers)
    assert {answers[1].stdout, answers[3].stdout} == {"model/1\n", "model/2\n"}


def write_image(path: Path) -> None:
    """Write an image to predict."""
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(path)


RACES: dict[str, Callable[[Home], None]] = {
    "publish": race_publish,
    "publish with readers": race_publish_with_readers,
    "report": race_report,
    "registry resolve": race_resolve,
    "train": race_train,
    "data prepare": race_prepare,
    "data export": race_export,
    "outputs": race_outputs,
    "first use of a registry": race_first_use,
}
"""Commands that are run at once, each time in a home that nobody else uses."""


def describe(tally: Tally) -> dict[str, Any]:
    """Describe a tally for a result."""
    return dict(vars(tally))
