#!/usr/bin/env python3
"""Writes what a run came to as the Markdown of a job summary: summarize.py RUN_FOLDER [--comparison FILE]

Standard library only, so that it needs no installation. GitHub takes pictures out of a summary unless they lie at an
address of their own, so the curves are drawn as Mermaid charts, and metrics.png is in the artifact.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_PLAIN = re.compile(r"[\w .,:=/+()%-]*")


def main() -> None:
    """Print the summary."""
    parser = argparse.ArgumentParser(description="Write what a run came to as Markdown.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--comparison", type=Path, help="file with what `image_classifier compare` printed")
    parser.add_argument("--artifact", default="", help="address of the artifact")
    arguments = parser.parse_args()
    folder: Path = arguments.run
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    epochs = _read_epochs(folder / "metrics.jsonl")
    parts = [_describe_end(folder, record, epochs)]
    if epochs:
        parts.append(_draw_curves(epochs))
    if (folder / "evaluation.json").is_file():
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        parts += [_describe_metrics(evaluation), _draw_classes(evaluation)]
    if arguments.artifact:
        parts.append(f"[The whole run, with `model.pth` and `metrics.png`]({arguments.artifact})")
    if arguments.comparison and arguments.comparison.is_file():
        text = arguments.comparison.read_text(encoding="utf-8").strip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        parts.append(f"### Against the previous run on the default branch\n\n{fence}\n{text}\n{fence}")
    parts += [_describe_identity(record), _describe_settings(record)]
    print("\n\n".join(parts))


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    """Read the lines of an interrupted run too, the last of which may be torn."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _describe_end(folder: Path, record: dict[str, Any], epochs: Sequence[dict[str, Any]]) -> str:
    title = _show(f"{record['experiment_name']}/{record['run_name']}")
    if (folder / "manifest.json").is_file():
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return f"## {title}\n\nFinished. Weights {_show_code(manifest['weights_digest'])}."
    wanted = record["settings"]["num_epochs"]
    return f"## {title}\n\nStopped after {len(epochs)} of {wanted} epochs, and saved: a continuation goes on from here."


def _draw_curves(epochs: Sequence[dict[str, Any]]) -> str:
    numbers = [epoch["epoch"] for epoch in epochs]
    charts = [
        _draw_chart("Loss of the training", "epoch", numbers, "line", [epoch["train_loss"] for epoch in epochs]),
        _draw_chart(
            "Accuracy of the training in %",
            "epoch",
            numbers,
            "line",
            [100 * epoch["train_accuracy"] for epoch in epochs],
        ),
    ]
    return "\n\n".join(charts)


def _draw_classes(evaluation: dict[str, Any]) -> str:
    classes = evaluation["per_class"]
    values = [100 * figures["accuracy"] for figures in classes.values()]
    return _draw_chart("Accuracy by class in %", "class", list(classes), "bar", values)


def _draw_chart(title: str, axis: str, labels: Sequence[Any], kind: str, values: Sequence[float]) -> str:
    names = ", ".join(json.dumps(str(label)) for label in labels)
    heights = ", ".join(f"{value:.4g}" for value in values)
    top = f"{max(1e-9, *values) * 1.05:.4g}" if "%" not in title else "100"
    lines = [f'title "{title}"', f"x-axis {axis} [{names}]", f"y-axis 0 --> {top}", f"{kind} [{heights}]"]
    return "\n".join(["```mermaid", "xychart-beta", *(f"    {line}" for line in lines), "```"])


def _describe_metrics(evaluation: dict[str, Any]) -> str:
    rows = [
        ("accuracy", f"**{evaluation['accuracy']:.2%}** of {evaluation['num_images']:,} images"),
        ("by single views", f"{evaluation['accuracy_single_view']:.2%}"),
        ("among the first five", f"{evaluation['top5_accuracy']:.2%}"),
        ("loss", f"{evaluation['loss']:.4f}"),
        ("macro F1", f"{evaluation['macro']['f1']:.4f}"),
    ]
    return _format_table(("on the test set", ""), rows)


def _describe_identity(record: dict[str, Any]) -> str:
    data, code, machine = record["data"], record["code"], record["machine"]
    rows = [
        ("data", f"{_show(data['name'])}, {data['num_train']:,} + {data['num_test']:,} images", data["digest"]),
        ("code", _show(f"{code['version']}, commit {code['commit'] or 'unknown'}"), code["digest"]),
        ("environment", _show(f"Python {record['environment']['python']}"), record["environment"]["digest"]),
        ("machine class", _show(", ".join(f"{k} {v}" for k, v in machine["class"].items() if v)), machine["digest"]),
    ]
    if record["pretrained"]:
        rows.append(("pretrained", _show(record["pretrained"]["path"]), record["pretrained"]["digest"]))
    return _format_table(
        ("made of", "", "digest"), ((name, what, _show_code(digest[:16])) for name, what, digest in rows)
    )


def _describe_settings(record: dict[str, Any]) -> str:
    settings = ((_show(name), _show_code(value)) for name, value in record["settings"].items())
    table = _format_table(("setting", "value"), settings)
    return f"<details><summary>Settings, from the recipe {_show(record['recipe'])}</summary>\n\n{table}\n\n</details>"


def _show(value: object) -> str:
    """Show a text as it is, on one line: as character references its marks mean nothing to Markdown and HTML."""
    line = "".join(character if character.isprintable() else " " for character in str(value))
    return "".join(character if _PLAIN.fullmatch(character) else f"&#{ord(character)};" for character in line)


def _show_code(value: object) -> str:
    shown = _show(value)
    return f"`{shown}`" if _PLAIN.fullmatch(shown) else f"<code>{shown}</code>"


def _format_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
