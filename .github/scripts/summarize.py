#!/usr/bin/env python3
"""Writes what a run came to as the Markdown of a job summary: summarize.py RUN_FOLDER [--comparison FILE]

Standard library only, so that it needs no installation. GitHub takes pictures out of a summary unless they lie at an
address of their own, so the curves are drawn as Mermaid charts, and metrics.png is in the artifact.

A summary comes out whatever is in the folder: what is missing or damaged is said, and names are written as code, in
which Markdown and HTML mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 2**25
MAX_CLASSES = 100
"""Of a chart; more bars cannot be told apart."""
MAX_LENGTH = 200
"""Of a text; GitHub shows no summary of more than a megabyte."""
BY_ANY_MACHINE, BY_ITS_CLASS = "any x86-64 with AVX2, or any aarch64", "a machine of the same class"
"""Who can train a run again to the bit: the words of the package, which is not installed here."""


def main() -> None:
    """Print the summary."""
    parser = argparse.ArgumentParser(description="Write what a run came to as Markdown.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--comparison", type=Path, help="file with what `image_classifier compare` printed")
    parser.add_argument("--artifact", default="", help="address of the artifact")
    arguments = parser.parse_args()
    summary = summarize(arguments.run, arguments.comparison, arguments.artifact)
    print(summary.encode("utf-8", "replace").decode("utf-8"))


def summarize(folder: Path, comparison: Path | None = None, artifact: str = "") -> str:
    """Build the summary of a run."""
    damaged: list[str] = []
    record = _read_object(folder / "run.json", damaged)
    epochs = _read_epochs(folder / "metrics.jsonl", damaged)
    parts = [_describe_end(folder, record, epochs, damaged), *_draw_curves(epochs)]
    if (folder / "evaluation.json").exists():
        evaluation = _read_object(folder / "evaluation.json", damaged)
        parts += [_describe_metrics(evaluation), *_describe_classes(evaluation)]
    if artifact:
        parts.append(f"[The whole run, with `model.pth` and `metrics.png`]({artifact})")
    text = _read(comparison, damaged) if comparison is not None and comparison.is_file() else None
    if text is not None:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        parts.append(f"### Against the previous run on the default branch\n\n{fence}\n{text.strip()[:50_000]}\n{fence}")
    parts += [_describe_identity(record), _describe_settings(record)]
    parts += [f"Missing or damaged: {', '.join(map(_format_code, damaged))}."] if damaged else []
    return "\n\n".join(parts)


def _read(path: Path, damaged: list[str]) -> str | None:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError:
        content = bytes(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        damaged.append(path.name)
        return None
    return content.decode("utf-8", "replace")


def _read_object(path: Path, damaged: list[str]) -> dict[str, Any]:
    """Read a JSON object; one that is missing or damaged is empty and noted."""
    text = _read(path, damaged)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        damaged.append(path.name)
        return {}
    return value


def _read_epochs(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """Read the lines of an interrupted run too, the last of which may be torn."""
    text = _read(path, damaged) if path.exists() else None
    lines = []
    for line in (text or "").split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            lines.append(None)
    epochs = [line for line in lines if isinstance(line, dict)]
    if len(epochs) < len(lines):
        damaged.append(path.name)
    return epochs


def _get(value: Any, *keys: str) -> Any:
    """Get what lies below the keys; None where there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value)


def _format_number(value: Any, template: str) -> str:
    return template.format(value) if _is_number(value) else "–"


def _to_text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "…"


def _format_code(value: Any) -> str:
    """Write a value of others as code: on one line, of printable characters, not too long."""
    text = _to_text(value)
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    text = text[: MAX_LENGTH - 1] + "…" if len(text) > MAX_LENGTH else text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`" if text.strip() else "–"


def _describe_end(folder: Path, record: dict[str, Any], epochs: Sequence[dict[str, Any]], damaged: list[str]) -> str:
    title = f"## {_format_code('/'.join(_to_text(record.get(name, '?')) for name in ('experiment_name', 'run_name')))}"
    if (folder / "manifest.json").exists():
        weights = _get(_read_object(folder / "manifest.json", damaged), "weights_digest")
        return f"{title}\n\nFinished. Weights {_format_code(weights or '?')}."
    wanted = _format_number(_get(record, "settings", "num_epochs"), "{}")
    return f"{title}\n\nStopped after {len(epochs)} of {wanted} epochs, and saved: a continuation goes on from here."


def _draw_curves(epochs: Sequence[dict[str, Any]]) -> list[str]:
    charts = []
    for title, name, scale in (
        ("Loss of the training", "train_loss", 1),
        ("Accuracy of the training in %", "train_accuracy", 100),
    ):
        points: list[tuple[Any, Any]] = [(epoch.get("epoch"), epoch.get(name)) for epoch in epochs]
        points = [(number, scale * value) for number, value in points if _is_number(number) and _is_number(value)]
        if points:
            numbers, values = zip(*points, strict=True)
            charts.append(_draw_chart(title, "epoch", numbers, "line", values))
    return charts


def _describe_classes(evaluation: dict[str, Any]) -> list[str]:
    classes = evaluation.get("per_class")
    rates = {name: _get(classes, name, "accuracy") for name in classes} if isinstance(classes, dict) else {}
    known = {name: 100 * rate for name, rate in rates.items() if _is_number(rate)}
    unknown = [name for name in rates if name not in known]
    parts = []
    if 0 < len(known) <= MAX_CLASSES:
        parts.append(_draw_chart("Accuracy by class in %", "class", list(known), "bar", list(known.values())))
    elif known:
        parts.append(f"`evaluation.json` has the accuracy of each of {len(known):,} classes.")
    if unknown:
        more = f" and {len(unknown) - 20:,} more" if len(unknown) > 20 else ""
        parts.append(f"Without test images: {', '.join(map(_format_code, unknown[:20]))}{more}.")
    return parts


def _draw_chart(title: str, axis: str, labels: Sequence[Any], kind: str, values: Sequence[float]) -> str:
    names = ", ".join(f'"{_clean_label(str(label))}"' for label in labels)
    heights = ", ".join(f"{value:.4g}" for value in values)
    top = f"{max(1e-9, *values) * 1.05:.4g}" if "%" not in title else "100"
    lines = [f'title "{title}"', f"x-axis {axis} [{names}]", f"y-axis 0 --> {top}", f"{kind} [{heights}]"]
    return "\n".join(["```mermaid", "xychart-beta", *(f"    {line}" for line in lines), "```"])


def _clean_label(text: str) -> str:
    """Leave out of a label what means something to Mermaid; quotes cannot be escaped there."""
    return "".join(letter if letter.isalnum() or letter in " _-.+/()" else "_" for letter in text)[:40] or "_"


def _describe_metrics(evaluation: dict[str, Any]) -> str:
    num_images = _format_number(evaluation.get("num_images"), "{:,}")
    classes = evaluation.get("per_class")
    top5 = [("top-5 accuracy", _format_number(evaluation.get("top5_accuracy"), "{:.2%}"))]
    rows = [
        ("accuracy", f"**{_format_number(evaluation.get('accuracy'), '{:.2%}')}** of {num_images} images"),
        ("accuracy, single view", _format_number(evaluation.get("accuracy_single_view"), "{:.2%}")),
        *(top5 if isinstance(classes, dict) and len(classes) > 5 else []),  # of five classes it is always 100 %
        ("loss", _format_number(evaluation.get("loss"), "{:.4f}")),
        ("macro F1", _format_number(_get(evaluation, "macro", "f1"), "{:.4f}")),
    ]
    return _format_table(("on the test set", ""), rows)


def _describe_identity(record: dict[str, Any]) -> str:
    data, code, environment, machine = (_get(record, part) for part in ("data", "code", "environment", "machine"))
    images = " + ".join(_format_number(_get(data, name), "{:,}") for name in ("num_train", "num_test"))
    of_class = _get(machine, "class")
    facts = (
        [f"{name} {_to_text(value)}" for name, value in of_class.items() if value] if isinstance(of_class, dict) else []
    )
    rows = [
        ("data", f"{_format_code(_get(data, 'name'))}, {images} images", data),
        (
            "code",
            _format_code(f"{_to_text(_get(code, 'version'))}, commit {_to_text(_get(code, 'commit') or 'unknown')}"),
            code,
        ),
        ("environment", _format_code(f"Python {_to_text(_get(environment, 'python'))}"), environment),
        ("machine class", _format_code(", ".join(facts)), machine),
    ]
    if record.get("pretrained"):
        rows.append(("pretrained", _format_code(_get(record, "pretrained", "path")), record["pretrained"]))
    digests = (_to_text(_get(part, "digest") or "?")[:16] for _, _, part in rows)
    table = [(name, what, _format_code(digest)) for (name, what, _), digest in zip(rows, digests, strict=True)]
    who = BY_ANY_MACHINE if _get(record, "settings", "instruction_set") == "portable" else BY_ITS_CLASS
    check = f"To train the run again and compare every bit, on {who}: `image_classifier verify RUN`"
    return _format_table(("made of", "", "digest"), table) + f"\n\n{check}"


def _describe_settings(record: dict[str, Any]) -> str:
    settings = record.get("settings")
    rows = list(settings.items())[:200] if isinstance(settings, dict) else []
    table = _format_table(("setting", "value"), [(_format_code(name), _format_code(value)) for name, value in rows])
    recipe = _clean_label(_to_text(record.get("recipe")))
    return f"<details><summary>Settings, from the recipe {recipe}</summary>\n\n{table}\n\n</details>"


def _format_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
