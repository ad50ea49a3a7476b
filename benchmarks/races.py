"""Let several processes write one name at once, kill some, and count what a reader finds torn and what is left.

    python -m benchmarks.races [--writes 100000] [--rounds 5]

A file and a folder are written by four processes, while two read them and others are killed at random moments; then
commands are run at once, in rounds, as the tests run them once (tests/integration/test_races.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measure import save_result
from tests.races import (
    RACES,
    Home,
    describe,
    race,
    read_file,
    read_folder,
    write_file_often,
    write_folder_often,
)


def prepare_home(folder: Path) -> Home:
    """Make a data set, a run and a published model."""
    home = Home(folder, folder / "dataset", folder / "runs" / "made" / "first", folder / "model")
    counts = ("--num_train", "1000", "--num_test", "200")
    settings = ("--recipe", "notebook", "--batch_size", "20", "--num_threads", "1")
    names = ("--experiments_folder", folder / "runs", "--experiment_name", "made", "--run_name", "first")
    for words in (
        ("data", "prepare", "--source", "sample", "--dataset_folder", home.dataset, *counts),
        ("train", *names, "--dataset_folder", home.dataset, *settings),
        ("publish", home.run),
    ):
        (answer,) = home.run_at_once(words)
        if answer.status != 0:
            sys.exit(f"{' '.join(map(str, words))}\n{answer.stderr}")
    (home.run / "published").rename(home.published)
    return home


def run_races(home: Home, num_rounds: int) -> dict[str, Any]:
    """Run each race of commands so many times; return how often, and what failed."""
    failures: list[str] = []
    rounds = Counter[str]()
    for number in range(1, num_rounds + 1):
        for name, run in RACES.items():
            print(f"round {number} of {num_rounds}: {name}", file=sys.stderr)
            try:
                run(home)
            except AssertionError as error:
                failures.append(f"{name}: {error}")
            rounds[name] += 1
    return {"rounds": dict(rounds), "failures": failures, "left": home.list_temporary()}


def main() -> int:
    """Run the races, write the result, and return 1 if anything was torn, failed or left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--writes", type=int, default=100_000, help="of a file, and a tenth of it of a folder")
    parser.add_argument("--kills", type=int, default=200, help="writers of the file that are killed")
    parser.add_argument("--rounds", type=int, default=5, help="of commands")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="races-") as scratch:
        folder = Path(scratch)
        for name in ("file", "folder"):
            (folder / name).mkdir()
        file = race(write_file_often, read_file, folder / "file" / "name", options.writes, num_kills=options.kills)
        print(file, file=sys.stderr)
        whole = race(
            write_folder_often,
            read_folder,
            folder / "folder" / "name",
            options.writes // 10,
            num_kills=options.kills // 4,
        )
        print(whole, file=sys.stderr)
        (folder / "home").mkdir()
        commands = run_races(prepare_home(folder / "home"), options.rounds)
    result = {
        "file": describe(file),
        "folder": describe(whole),
        "commands": commands,
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_result("races", result)
    print(f"{file.num_torn + whole.num_torn} torn, {len(commands['failures'])} failures, {result['seconds']} s")
    is_bad = file.num_torn + whole.num_torn or commands["failures"] or file.left + whole.left + commands["left"]
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
