"""What an audit of a part costs: `verify --sample 4` of a run with 8 segments beside `verify` of all of it, in turns.

    python -m benchmarks.audits --dataset_folder DATA [--recipe quick] [--pairs 3] [--num_epochs 8]

The run keeps a checkpoint after each epoch. Both commands train on all images, evaluate on all test images, and are
measured from the command to the verdict. Each pair draws other segments.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, build_parser, measure_command, save_result, summarize, to_row, write_table

NUM_DRAWN = 4
DOCUMENT = PROJECT / "docs" / "proofs.md"


def train(recipe: str, num_epochs: int, dataset_folder: Path, instruction_set: str, scratch: Path) -> tuple[Path, int]:
    """Train a run with a checkpoint after each epoch; return its folder and the steps of an epoch."""
    command = [sys.executable, "-m", "image_classifier.main", "--recipe", recipe, "--num_epochs", str(num_epochs)]
    command += ["--experiments_folder", str(scratch), "--experiment_name", "audits", "--run_name", "run"]
    command += ["--dataset_folder", str(dataset_folder), "--instruction_set", instruction_set]
    command += ["--keep_checkpoints", "all", "--checkpoint_every", "1epochs"]
    measure_command(command)
    folder = scratch / "audits" / "run"
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, int(epochs[0]["step"])


def measure_pairs(folder: Path, num_pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Verify a run whole and in part, in turns."""
    verify = [sys.executable, "-m", "image_classifier", "verify", str(folder)]
    runs: dict[str, list[dict[str, Any]]] = {"whole": [], "sample": []}
    for number in range(num_pairs):
        sides = {"whole": verify, "sample": [*verify, "--sample", str(NUM_DRAWN), "--nonce", str(number)]}
        for side in sorted(sides, reverse=number % 2 == 0):
            runs[side].append(to_row(measure_command(sides[side])))
            print(f"{side}: {runs[side][-1]['seconds']:.1f} s", flush=True)
    return runs


def build_table(result: dict[str, Any]) -> str:
    """Build the sentence of docs/proofs.md."""
    ratio = result["ratio"]
    return (
        f"For `{result['recipe']}` with 8 epochs, `--sample {NUM_DRAWN}` takes {ratio['mean']:.2f} times as long as "
        f"all "
        f"segments ({ratio['least']:.2f} to {ratio['most']:.2f}, {ratio['runs']} pairs).\n"
    )


def main() -> None:
    """Measure, save and write the sentence."""
    parser = build_parser(__doc__)
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--num_epochs", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, steps = train(
            arguments.recipe, arguments.num_epochs, arguments.dataset_folder, arguments.instruction_set, Path(scratch)
        )
        runs = measure_pairs(folder, arguments.pairs)
    ratios = [part["seconds"] / whole["seconds"] for part, whole in zip(runs["sample"], runs["whole"], strict=True)]
    result = {"recipe": arguments.recipe, "steps_an_epoch": steps, "ratio": summarize(ratios), "runs": runs}
    save_result("audits", result)
    write_table(DOCUMENT, "audits", build_table(result))


if __name__ == "__main__":
    main()
