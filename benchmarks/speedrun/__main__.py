"""A leaderboard of training times: trains an entry, and makes the table of all entries that are proved.

    python -m benchmarks.speedrun --dataset_folder DATA --recipe fast [--num_seeds 3] [--instruction_set portable]
    python -m benchmarks.speedrun --dataset_folder DATA

With a recipe it trains that first, under the clock. Either way it then trains every entry below --experiments_folder
again by `verify`, and takes into the table those that come out IDENTICAL and break no rule (docs/speedrun.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, build_parser, load_result, save_result, write_table
from benchmarks.speedrun.entries import CLOCK, Refused, check_entry, get_clock_path, train_entry
from image_classifier.recipe import RECIPES

DOCUMENT = PROJECT / "docs" / "speedrun.md"
EXPERIMENT = "speedrun"


def accept_entries(folder: Path, dataset_folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Check every entry in a folder; return the rows of those that are accepted, and why others are not."""
    rows: dict[str, dict[str, Any]] = {}
    refused = {}
    for clock in sorted(folder.glob(f"*{CLOCK}")):
        run = clock.with_name(clock.name.removesuffix(CLOCK))
        try:
            row = check_entry(run, dataset_folder).to_json()
            if rows.setdefault(row["manifest_digest"], row) is not row:
                raise Refused("it is a copy of another entry")
        except Refused as error:
            refused[run.name] = str(error)
    return sorted(rows.values(), key=lambda row: row["seconds"]), refused


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/speedrun.md, the fastest entry first."""
    rows = result.get("rows", [])
    if not rows:
        return "No entry yet: `python -m benchmarks.speedrun --dataset_folder DATA --recipe fast`\n"
    lines = [
        "| entry | accuracy (views) | time | time to verify | data | machine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cap = "" if row["instruction_set"] == "native" else f", {row['instruction_set']}"
        changes = "".join(f", {name} {value}" for name, value in row["changes"].items())
        cells = [
            f"`{row['recipe']}`, seed {row['seed']}{changes}",
            f"{row['accuracy']:.2%} ({row['views']})".replace("%", " %"),
            f"{row['seconds']:,.1f} s",
            f"{row['seconds_again']:,.1f} s",
            f"{row['data']} {row['data_digest'][:12]}, {row['num_train']:,} + {row['num_test']:,} images",
            f"{row['cores']} cores of an {row['processor']}{cap}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    verifier = f"{result['cores']} cores of an {result['processor']}, {result['measured_at'][:10]}"
    code = f"code {rows[0]['code_digest'][:12]}, commit {result['commit'][:8]}"
    return (
        "\n".join([*lines, "", f"Each entry was trained again with the verdict IDENTICAL: {verifier}, {code}."]) + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is asked for, check all entries, and write the table; 1 if an entry was refused."""
    parser = build_parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--num_seeds", type=int, default=1)
    parser.add_argument("--experiments_folder", type=Path, default=PROJECT / "experiments")
    parser.add_argument("--options", default="", help="more options of the trainer")
    arguments = parser.parse_args(argv)
    folder = arguments.experiments_folder.resolve() / EXPERIMENT
    options = ["--instruction_set", arguments.instruction_set, *arguments.options.split()]
    for seed in range(arguments.num_seeds if arguments.recipe else 0):
        if not get_clock_path(folder / f"{arguments.recipe}-{seed}").exists():
            train_entry(folder, arguments.dataset_folder, arguments.recipe, seed, options)
    rows, refused = accept_entries(folder, arguments.dataset_folder)
    for name, reason in refused.items():
        print(f"refused: {name}: {reason}", file=sys.stderr)
    save_result("speedrun", {"rows": rows, "refused": refused})
    write_table(DOCUMENT, "speedrun", build_table(load_result("speedrun")))
    print(build_table(load_result("speedrun")), end="")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
