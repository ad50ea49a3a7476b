"""This checkout beside one of another commit, in turns: seconds to train recipes, requests a second of the server.

    git worktree add ../before COMMIT && make -C ../before venv
    python -m benchmarks.revisions --before ../before --dataset_folder DATA --recipe quick --run RUN
    python -m benchmarks.revisions --before ../before --dataset_folder DATA --recipe fast --rounds 2 \\
        --options "--num_epochs 1 --image_sizes [24]"

`make venv` builds the other checkout's kernels. Both sides run in this environment, and the table says whether they
give the same weights. `--options` of the trainer shorten the recipe. The server of each
side answers for the same published runs, which the commit before has made, so that it can read them. Adds the other
commit's part to benchmarks/results/revisions.json, and writes the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, load_result, measure_command, save_result, write_table
from benchmarks.serving import RAW, SERVERS, load_images, load_with_wrk, serving

CONNECTIONS = 32


def read_commit(project: Path) -> str:
    """Read the commit that a checkout has."""
    words = ["git", "-C", str(project), "rev-parse", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def train(project: Path, recipe: str, options: Sequence[str], dataset_folder: Path) -> dict[str, Any]:
    """Train a recipe by a checkout's command; return seconds of the command and of its epochs, and the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-P", "-m", "image_classifier.main", "--experiments_folder", scratch]
        words += ["--experiment_name", "e", "--run_name", "r", "--recipe", recipe, *options]
        measured = measure_command([*words, "--dataset_folder", dataset_folder], PYTHONPATH=str(project))
        folder = Path(scratch) / "e" / "r"
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "seconds": measured.seconds,
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 3),
        "weights_digest": manifest["weights_digest"],
    }


def measure_training(
    before: Path, recipes: Sequence[str], options: Sequence[str], rounds: int, dataset_folder: Path
) -> dict[str, Any]:
    """Train each recipe on both sides in turns; return each recipe's ratio of training time, and whether bits agree."""
    result = {}
    for recipe in recipes:
        rows: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
        for number in range(rounds):
            for side in ("before", "now") if number % 2 == 0 else ("now", "before"):
                project = before if side == "before" else PROJECT
                rows[side].append(train(project, recipe, options, dataset_folder))
                print(recipe, side, rows[side][-1], flush=True)
        result[recipe] = {
            "options": " ".join(options),
            "same_weights": len({row["weights_digest"] for side in rows.values() for row in side}) == 1,
            "rows": rows,
        }
    return result


def measure_serving(before: Path, runs: Sequence[Path], seconds: float, rounds: int) -> dict[str, Any]:
    """Load the servers of both sides in turns; return the ratios of requests a second and of p99, by run."""
    result = {}
    for run in runs:
        pixels = load_images(run)[0]
        rows: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for number in range(rounds):
            for side in ("before", "now") if number % 2 == 0 else ("now", "before"):
                project = before if side == "before" else PROJECT
                with serving("own", run, project=project) as (_, port):
                    path = SERVERS["own"].path
                    load_with_wrk(port, path, RAW, pixels, CONNECTIONS, 1)
                    rows[side].append(load_with_wrk(port, path, RAW, pixels, CONNECTIONS, seconds))
                print(run.name, side, rows[side][-1], flush=True)
        result[run.name] = {
            "connections": CONNECTIONS,
            "rows": rows,
        }
    return result


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md: ratios of this commit to the other one, median and range."""

    def describe(rows: dict[str, list[dict[str, float]]], key: str) -> str:
        ratios = [now[key] / then[key] for then, now in zip(rows["before"], rows["now"], strict=True)]
        middle = statistics.median(ratios)
        return f"{middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"

    lines = ["| measure | this commit, relative to the earlier one |", "|---|---|"]
    for recipe, facts in result["training"].items():
        weights = "same weights" if facts["same_weights"] else "DIFFERENT WEIGHTS"
        ratio = describe(facts["rows"], "training_seconds")
        lines.append(f"| training time, `{recipe}`, {weights} | {ratio} |")
    for name, facts in result["serving"].items():
        requests, p99 = describe(facts["rows"], "requests_per_second"), describe(facts["rows"], "p99_ms")
        lines += [f"| requests per second, `{name}` | {requests} |", f"| p99 latency, `{name}` | {p99} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the other commit, with its kernels")
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--recipe", nargs="*", default=[], help="recipes to train")
    parser.add_argument("--options", default="--num_epochs 1", help="of the trainer")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="published runs to serve")
    parser.add_argument("--seconds", type=float, default=5, help="of each load on the server")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before = options.before.resolve()
    result = {key: value for key, value in load_result("revisions").items() if key in ("training", "serving")}
    result |= {"before": read_commit(before)}
    trained = measure_training(before, options.recipe, options.options.split(), options.rounds, options.dataset_folder)
    result["training"] = result.get("training", {}) | trained
    served = measure_serving(before, options.run, options.seconds, options.rounds)
    result["serving"] = result.get("serving", {}) | served
    save_result("revisions", result)
    write_table(PROJECT / "benchmarks" / "README.md", "revisions", build_table(result))


if __name__ == "__main__":
    main()
