"""One sweep by 1, 2 and 4 workers, and by 2 that are killed: whether it is the same, and what the winner gives.

    python -m benchmarks.sweep --dataset_folder DATA [--num_trials 20] [--num_images 20000] [--num_kills 10]
        [--num_seeds 5] [--options "--num_epochs 2"]
    python -m benchmarks.sweep    writes the table in docs/sweep.md anew

DATA holds real CIFAR-10. The sweep is over recipe `quick` on images that are drawn from the training set, apart from
the last 10,000 of it. It is judged on a tenth of these images. All sweeps lie in a PostgreSQL that is started here
(Debian: postgresql). Their workers share the cores evenly. In the last sweep a worker is killed by SIGKILL again and
again, each time one drawn at random, and another one is started; half way PostgreSQL is stopped for some seconds.

The best settings and those of `quick` are then trained on all drawn images with several seeds and compared on the
10,000 images that no sweep has seen. The test set takes no part. Sweeps that an interrupted call has measured are not
made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks.measure import PROJECT, load_result, measure_recipe, save_result, write_table
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.reading import read_chain, read_manifest
from tests.postgres import PASSWORD, Cluster

DOCUMENT = PROJECT / "docs" / "sweep.md"
NUM_HELD_OUT = 10_000
NUM_PARALLEL = 4
SPACE = """\
learning_rate: {low: 0.05, high: 0.8, log: true}
momentum: {low: 0.3, high: 0.9}
weight_decay: {low: 0.0001, high: 0.01, log: true}
label_smoothing: {choices: [0, 0.1, 0.2]}
translate: {low: 0, high: 4}
"""
SIDES = [(1, False), (2, False), (4, False), (2, True)]
"""Workers of each sweep, and whether some are killed."""


class Workers:
    """The workers of one sweep, each a process of the command."""

    def __init__(self, words: Sequence[str], count: int, log: Path) -> None:
        self._words = words
        self._log = log
        self._running = [self._start() for _ in range(count)]
        self.num_killed = 0

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "DB_PASSWORD": PASSWORD}
        with open(self._log, "ab") as log:
            return subprocess.Popen(self._words, cwd=PROJECT, env=environment, stdout=log, stderr=log)

    def kill_one(self, chance: random.Random) -> bool:
        """Kill a worker that works, and start another; say whether there was one."""
        working = [process for process in self._running if process.poll() is None]
        if not working:
            return False
        process = chance.choice(working)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:  # it had just come to its end
            return False
        self._running[self._running.index(process)] = self._start()
        self.num_killed += 1
        return True

    def revive(self) -> None:
        """Start those anew that were just starting, and found the storage stopped."""
        for number, process in enumerate(self._running):
            if process.poll() == 2 and b"--storage: " in self._log.read_bytes():
                self._running[number] = self._start()

    def is_done(self) -> bool:
        """Say whether all have come to their end.

        Raises:
            SystemExit: one failed.
        """
        statuses = [process.poll() for process in self._running]
        if any(statuses):
            for process in self._running:
                process.kill()
            sys.exit(f"exit status {statuses}\n{self._log.read_text()[-5000:]}")
        return None not in statuses


def harass(workers: Workers, cluster: Cluster, num_kills: int, seconds: tuple[float, float]) -> int:
    """Kill workers at random moments, and stop PostgreSQL half way; return how often it was stopped."""
    chance, num_stops = random.Random(0), 0
    while workers.num_killed < num_kills and not workers.is_done():
        time.sleep(chance.uniform(*seconds))
        workers.kill_one(chance)
        if workers.num_killed >= num_kills / 2 and not num_stops and not workers.is_done():
            cluster.stop()
            time.sleep(5)
            cluster.start()
            workers.revive()
            num_stops += 1
    return num_stops


def measure_sweep(
    count: int, kills: bool, cluster: Cluster, dataset: Path, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Carry out the sweep with so many workers; return its time, trials and winner."""
    database = f"sweep_{count}_{'killed' if kills else 'calm'}"
    cluster.execute("postgres", f"CREATE DATABASE {database}")
    address = f"postgresql://owner@127.0.0.1:{cluster.port}/{database}"
    num_threads = max(1, len(os.sched_getaffinity(0)) // count)
    words = f"--space {scratch / 'space.yaml'} --num_trials {arguments.num_trials} --parallel {NUM_PARALLEL} "
    words += f"--pruner median --recipe quick --validation_fraction 0.1 --num_threads {num_threads} "
    words += f"--dataset_folder {dataset} --experiments_folder {scratch} --experiment_name {database} "
    words += f"--storage {address} {arguments.options}"
    started = time.perf_counter()
    command = [sys.executable, "-m", "image_classifier", "sweep", *words.split()]
    workers = Workers(command, count, scratch / f"{database}.log")
    num_stops = harass(workers, cluster, arguments.num_kills, tuple(arguments.kill_after)) if kills else 0
    while not workers.is_done():
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    trials = load_trials(address, database, scratch / database)
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    return {
        "workers": count,
        "threads": num_threads,
        "kills": workers.num_killed,
        "stops": num_stops,
        "seconds": round(seconds, 1),
        "winner": max(complete, key=lambda trial: (trial["value"], -trial["number"]))["number"],
        "trials": trials,
        "recipe": (scratch / database / "best.yaml").read_text(),
    }


def load_trials(address: str, name: str, folder: Path) -> list[dict[str, Any]]:
    """Load what Optuna's storage has of a sweep, with the bits of the runs."""
    url = address.replace("postgresql:", "postgresql+psycopg:")
    storage = optuna.storages.RDBStorage(url, {"connect_args": {"password": PASSWORD}})
    trials = []
    for trial in optuna.load_study(study_name=name, storage=storage).trials:
        run = folder / f"trial-{trial.number:04}"
        facts = {"number": trial.number, "state": trial.state.name, "value": trial.value, "settings": trial.params}
        values = [value for _, value in sorted(trial.intermediate_values.items())]
        chain = [line["digest"] for line in read_chain(run)] if (run / "digests.jsonl").exists() else []
        weights = read_manifest(run)["weights_digest"] if is_finished(run) else None
        trials.append({**facts, "accuracies": values, "chain_head": chain[-1:], "weights_digest": weights})
    storage.engine.dispose()
    return trials


def compare_settings(recipe: str, dataset: Path, scratch: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the best settings and those of `quick` with each seed; return their accuracies on the held-out images."""
    path = scratch / "best.yaml"
    path.write_text(recipe)
    runs = []
    for seed in range(arguments.num_seeds):
        options = {"winner": ["--config", str(path)], "quick": arguments.options.split()}
        sides = {side: measure_recipe("quick", seed, dataset, options=words) for side, words in options.items()}
        runs.append({"seed": seed, **{side: run["accuracy_single_view"] for side, run in sides.items()}})
        print(f"seed {seed}: winner {runs[-1]['winner']:.2%}, quick {runs[-1]['quick']:.2%}", flush=True)
    return runs


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/sweep.md: a row a sweep, and what the winner's settings give."""
    if not result:
        return "Not measured yet: `python -m benchmarks.sweep`\n"
    first = result["sweeps"][0]
    lines = [
        "| workers, threads per worker | workers killed | PostgreSQL stopped | trials and bits | winner | time |",
        "|---|---|---|---|---|---|",
    ]
    for sweep in result["sweeps"]:
        same = "the same" if sweep["trials"] == first["trials"] else "**different**"
        states = [trial["state"] for trial in sweep["trials"]]
        trials = f"{len(states)}, {states.count('PRUNED')} pruned" if sweep is first else same
        cells = f"{sweep['workers']}, {sweep['threads']} | {sweep['kills']} | {sweep['stops']} | {trials}"
        lines.append(f"| {cells} | trial {sweep['winner']} | {sweep['seconds']:,.0f} s |")
    calm = {sweep["workers"]: sweep["seconds"] for sweep in result["sweeps"] if not sweep["kills"]}
    if {1, 2} <= calm.keys():
        lines += ["", f"2 workers take {calm[2] / calm[1]:.2f} times as long as 1, on {result['cores']} cores."]
    if result.get("compared"):
        sides = {side: [run[side] for run in result["compared"]] for side in ("winner", "quick")}
        differences = [run["winner"] - run["quick"] for run in result["compared"]]
        spread = f" ± {statistics.stdev(differences):.2%}" if len(differences) > 1 else ""
        means = {side: f"{statistics.fmean(values):.2%}" for side, values in sides.items()}
        lines += [
            "",
            f"On {NUM_HELD_OUT:,} held-out images, without test-time augmentation, means of {len(differences)} seeds: "
            f"winner {means['winner']}, `quick` {means['quick']}. The paired difference is "
            f"{statistics.fmean(differences):+.2%}{spread}. Both were trained on {result['num_images']:,} images "
            f"(`{result['options']}`).",
        ]
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Measure what is asked for, save after each sweep, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path)
    parser.add_argument("--num_trials", type=int, default=20)
    parser.add_argument("--num_images", type=int, default=20_000)
    parser.add_argument("--num_kills", type=int, default=10)
    parser.add_argument("--kill_after", type=float, nargs=2, default=(6.0, 15.0), help="seconds, least and most")
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--options", default="--num_epochs 2", help="of the trainer, for `quick` and all trials")
    arguments = parser.parse_args()
    if arguments.dataset_folder is not None:
        measure(arguments)
    write_table(DOCUMENT, "sweep", build_table(load_result("sweep")))


def measure(arguments: argparse.Namespace) -> None:
    """Measure each sweep, and what the winner gives."""
    snapshot = load_snapshot(arguments.dataset_folder)
    drawn = np.random.default_rng(0).permutation(snapshot.num_train - NUM_HELD_OUT)[: arguments.num_images]
    held_out = np.arange(snapshot.num_train - NUM_HELD_OUT, snapshot.num_train)
    facts = {name: getattr(arguments, name) for name in ("num_trials", "num_images", "options")}
    cluster = Cluster()
    try:
        cluster.start()
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            (scratch / "space.yaml").write_text(SPACE)
            (scratch / "data").mkdir()
            dataset = write_subset(snapshot, scratch / "data", drawn, held_out)
            result = load_result("sweep")
            sweeps = result.get("sweeps", []) if facts.items() <= result.items() else []
            for count, kills in SIDES:
                if (count, kills) in {(sweep["workers"], sweep["kills"] > 0) for sweep in sweeps}:
                    continue
                sweeps.append(measure_sweep(count, kills, cluster, dataset, scratch, arguments))
                save_result("sweep", {**facts, "space": SPACE, "sweeps": sweeps})
                kinds = json.dumps({key: sweeps[-1][key] for key in ("workers", "kills", "stops", "seconds", "winner")})
                print(f"{kinds}: trials as the first: {sweeps[-1]['trials'] == sweeps[0]['trials']}", flush=True)
            compared = compare_settings(sweeps[0]["recipe"], dataset, scratch, arguments)
            save_result("sweep", {**facts, "space": SPACE, "sweeps": sweeps, "compared": compared})
    finally:
        cluster.remove()


if __name__ == "__main__":
    main()
