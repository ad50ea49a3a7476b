"""One page about a run: a single HTML file with its pictures inside, no script, and nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.config import describe_views
from image_classifier.progress import track
from image_classifier.tracking.record import describe_checkers, describe_head
from image_classifier.tracking.trace import Link
from image_classifier.visualization.figures import (
    DARK,
    LIGHT,
    Theme,
    draw_confusion_matrix,
    draw_curves,
    draw_reliability,
)

NUM_MISTAKES = 24
NUM_CONFUSIONS = 6


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a finished run's folder holds.

    Attributes:
        path: of the folder, as the commands on the page name it.
        record: run.json.
        epochs: the lines of metrics.jsonl.
        evaluation: evaluation.json.
        chain: the lines of digests.jsonl.
        manifest: manifest.json.
        probabilities: float32 [N, C] of the test set.
        labels: int64 [N] of the test set.
        links: where it comes from, as `trace` finds it; none leaves the picture out.
    """

    path: str
    record: dict[str, Any]
    epochs: Sequence[dict[str, Any]]
    evaluation: dict[str, Any]
    chain: Sequence[dict[str, Any]]
    manifest: dict[str, Any]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    links: Sequence[Link] = ()


@track("drawing the report")
def build_report(facts: RunFacts, images: NDArray[np.uint8] | str) -> str:
    """Build the page. All that it shows is escaped: names of runs and classes are others' to choose.

    Args:
        images: uint8 [N, 3, S, S], the test set; or the reason why it cannot be shown.
    """
    template = Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    record, evaluation = facts.record, facts.evaluation
    return template.substitute(
        title=escape(f"{record['experiment_name']} / {record['run_name']}"),
        subtitle=_build_subtitle(record),
        figures=_build_figures(evaluation),
        notes=_build_notes(record["data"].get("notes", [])),
        curves=_build_curves(facts),
        classes=_build_classes(evaluation),
        confusion_matrix=_build_picture(
            lambda theme: draw_confusion_matrix(evaluation, theme),
            "Confusion matrix: the classes that the images of each class were taken for",
        ),
        confusions=_build_confusions(evaluation),
        reliability=_build_picture(
            lambda theme: draw_reliability(
                facts.probabilities, facts.labels, evaluation["expected_calibration_error"], theme
            ),
            "Reliability diagram: accuracy by the probability of the predicted class",
        ),
        mistakes=_build_mistakes(facts, images),
        settings="\n".join(
            f"<div><dt>{escape(name)}</dt><dd>{_escape_value(value)}</dd></div>"
            for name, value in record["settings"].items()
        ),
        links=_build_links(facts.links),
        identity=_build_identity(record),
        verification=_build_verification(facts),
    )


def find_surest_mistakes(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], count: int = NUM_MISTAKES
) -> list[int]:
    """Find the images classified wrongly with the highest probability, the surest first."""
    predicted = probabilities.argmax(axis=1)
    confidence = np.where(predicted != labels, probabilities.max(axis=1), -1)
    order = np.argsort(-confidence, kind="stable")[:count]
    return [int(index) for index in order if confidence[index] >= 0]


def find_confusions(evaluation: dict[str, Any], count: int = NUM_CONFUSIONS) -> list[tuple[str, str, int]]:
    """Find the most frequent confusions: true class, predicted class, number of images."""
    names = list(evaluation["per_class"])
    confusions = [
        (names[row], names[column], images)
        for row, counts in enumerate(evaluation["confusion_matrix"])
        for column, images in enumerate(counts)
        if row != column and images
    ]
    return sorted(confusions, key=lambda confusion: -confusion[2])[:count]


def _build_subtitle(record: dict[str, Any]) -> str:
    settings, data = record["settings"], record["data"]
    recipe = f", recipe {record['recipe']}" if record["recipe"] else ""
    reason = f" ({record['recipe_reason']})" if record.get("recipe_reason") else ""
    words = f"{settings['model']} on {data['name']}{recipe}{reason}, seed {settings['seed']}"
    return escape(f"{words}, started {record['started_at']}")


def _build_figures(evaluation: dict[str, Any]) -> str:
    figures = {
        f"test accuracy, {describe_views(evaluation['views'])}": _format_percentage(evaluation["accuracy"]),
        "test accuracy, single view": _format_percentage(evaluation["accuracy_single_view"]),
        "top-5 accuracy": _format_percentage(evaluation["top5_accuracy"]),
        "test loss": f"{evaluation['loss']:.4f}",
        "calibration error": _format_percentage(evaluation["expected_calibration_error"]),
        "test images": f"{evaluation['num_images']:,}",
    }
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())


def _build_notes(notes: Sequence[str]) -> str:
    """Build the list of what is to be known of the data."""
    items = "".join(f"<li>{_escape_value(note)}</li>" for note in notes)
    return items and f'<ul class="notes">{items}</ul>'


def _build_curves(facts: RunFacts) -> str:
    if not facts.epochs:
        return '<p class="muted">Nothing was trained, so there are no curves.</p>'
    return _build_picture(
        lambda theme: draw_curves(facts.epochs, facts.evaluation, theme), "Loss and accuracy by epoch of the training"
    )


def _build_picture(draw: Callable[[Theme], bytes], description: str) -> str:
    """A picture in two colours, of which the browser chooses the one that fits the page."""
    light, dark = (_encode_png(draw(theme)) for theme in (LIGHT, DARK))
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img class="figure" src="{light}" alt="{escape(description)}"></picture>'
    )


def _build_classes(evaluation: dict[str, Any]) -> str:
    rows = []
    for name, scores in evaluation["per_class"].items():
        part = f"{100 * (scores['accuracy'] or 0):.2f}%"
        accuracy, precision, f1 = (_format_percentage(scores[rate], 1) for rate in ("accuracy", "precision", "f1"))
        rows.append(
            f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>'
            f'<td class="bar"><span style="--part: {part}">{accuracy}</span></td>'
            f'<td class="number">{precision}</td><td class="number">{f1}</td>'
            f'<td class="number">{scores["support"]:,}</td></tr>'
        )
    heading = '<th>class</th><th>accuracy</th><th class="number">precision</th><th class="number">F1</th>'
    return (
        f'<table class="classes"><thead><tr>{heading}<th class="number">images</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _build_confusions(evaluation: dict[str, Any]) -> str:
    per_class = evaluation["per_class"]
    rows = [
        f"<tr><td>{escape(true)}</td><td>{escape(predicted)}</td>"
        f'<td class="number">{images:,} of {per_class[true]["support"]:,}</td></tr>'
        for true, predicted, images in find_confusions(evaluation)
    ]
    if not rows:
        return "<p>No image is taken for another class.</p>"
    heading = '<th>true class</th><th>taken for</th><th class="number">images</th>'
    return f'<table><thead><tr>{heading}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _build_mistakes(facts: RunFacts, images: NDArray[np.uint8] | str) -> str:
    if isinstance(images, str):
        return f'<p class="muted">The test images cannot be shown: {escape(images)}</p>'
    indices = find_surest_mistakes(facts.probabilities, facts.labels)
    if not indices:
        return "<p>There are none: every test image is classified rightly.</p>"
    names = [escape(name) for name in facts.evaluation["per_class"]]
    items = []
    for index in indices:
        row, label = facts.probabilities[index], int(facts.labels[index])
        predicted = int(row.argmax())
        items.append(
            f'<li><img src="{_encode_image(images[index])}" alt="test image {index}: {names[label]}" width="96" '
            f'height="96"><span class="wrong">{names[predicted]} {_format_percentage(row[predicted], 1)}</span>'
            f"<span>is {names[label]}, {_format_percentage(row[label], 1)}</span>"
            f'<span class="muted">test image {index}</span></li>'
        )
    return f'<ul class="mistakes">{"".join(items)}</ul>'


_MARKS = {"equal": "\u2713", "different": "\u2717", "missing": "\u2717", "unchecked": "?"}


def _build_links(links: Sequence[Link]) -> str:
    """Draw the way from the model to what it was made of, each step with whether it was checked."""
    items = [
        f'<li class="{link.state}"><b>{_MARKS[link.state]} {escape(link.name)}: {link.state}</b>'
        f'<span class="digest">{escape(link.digest[:12])}</span><span>{escape(link.what)}</span>'
        f'<span class="muted">{escape(link.reason)}</span></li>'
        for link in links
    ]
    listed = f'<ol class="links">{"".join(items)}</ol>'
    return f'<section class="wide">\n<h2>Where it comes from</h2>\n{listed}\n</section>' if items else ""


def _build_identity(record: dict[str, Any]) -> str:
    data, code, environment, machine = (record[part] for part in ("data", "code", "environment", "machine"))
    changes = {True: ", with uncommitted changes", False: "", None: ""}[code.get("uncommitted_changes")]
    counts = [f"{data[f'num_{part}']:,} to {verb}" for part, verb in _PARTS if data.get(f"num_{part}")]
    described = {
        "data": (f"{data['name']}, {len(data['classes'])} classes: {', '.join(counts)}", data["digest"]),
        "code": (f"version {code['version']}, commit {code.get('commit') or 'unknown'}{changes}", code["digest"]),
        "environment": (f"Python {environment['python']}", environment["digest"]),
        "machine class": (_list_values(machine["class"]), machine["digest"]),
        "can be checked by": (f"{describe_checkers(record)}: image_classifier verify RUN", ""),
        "starts from": (
            (f"{record['pretrained']['path']}: {describe_head(record)}", record["pretrained"]["digest"])
            if record["pretrained"]
            else ("weights drawn from the seed", "")
        ),
    }
    rows = [
        f'<tr><th scope="row">{name}</th><td>{escape(words)}<br><span class="digest">{escape(digest)}</span></td></tr>'
        for name, (words, digest) in described.items()
    ]
    for change in record.get("changes", []):
        words = "; ".join(f"{part}: {what}" for part, what in change.items() if part != "resumed_at")
        when = escape(f"resumed {change.get('resumed_at')} with another {words}")
        rows.append(f'<tr><th scope="row">changed</th><td>{when}</td></tr>')
    distributions = escape(_list_values(environment["distributions"]))
    return (
        f"<table class=\"identity\"><tbody>{''.join(rows)}</tbody></table>"
        f"<details><summary>Installed distributions</summary><code>{distributions}</code></details>"
    )


_PARTS = (("train", "train on"), ("validation", "validate on"), ("test", "test on"))


def _build_verification(facts: RunFacts) -> str:
    run = shlex.quote(facts.path)
    weights = escape(str(facts.manifest.get("weights_digest", "unknown")))
    paragraphs = [f'<p>Weights <span class="digest">{weights}</span></p>']
    if facts.chain:
        head = facts.chain[-1]
        breaks = sum("break" in line for line in facts.chain)
        links = f"{len(facts.chain):,} digests of the whole state, each over the one before it"
        links += f", {breaks} of them for a change of the machine" if breaks else ""
        paragraphs.append(
            f'<p>Head of the digest chain, at step {escape(str(head["step"]))}: '
            f'<span class="digest">{escape(str(head["digest"]))}</span><br><span class="muted">{links}</span></p>'
        )
    else:
        paragraphs.append('<p class="muted">There is no digest chain, as nothing was trained.</p>')
    commands = escape(f"image_classifier verify --files_only {run}  # seconds: every file is what was written")
    commands += "\n" + escape(f"image_classifier verify {run}  # trains it again: every bit is the same")
    return "\n".join(paragraphs) + f"\n<pre><code>{commands}</code></pre>"


def _encode_image(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="PNG")
    return _encode_png(buffer.getvalue())


def _encode_png(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _format_percentage(fraction: float | None, digits: int = 2) -> str:
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def _escape_value(value: Any) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _list_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
