"""One page about a run: a single HTML file with its pictures inside, no script, and nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.choices import describe_views
from image_classifier.metrics import MIN_TOP5_CLASSES
from image_classifier.progress import track
from image_classifier.text import count
from image_classifier.tracking.record import describe_checkers, describe_head
from image_classifier.tracking.trace import Link
from image_classifier.visualization.confusion import MAX_NAMED, draw_confusion_matrix, order_by_similarity
from image_classifier.visualization.figures import DARK, LIGHT, Theme, draw_curves, draw_reliability

NUM_MISTAKES = 24
NUM_CONFUSIONS = 6
MAX_NARROW = 20
"""Classes up to which the confusion matrix shares its row with another picture."""


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
        links: its provenance, as `trace` finds it; none leaves the section out.
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


@dataclass(frozen=True)
class Saliency:
    """On which pixels of a test image the network's answer depends.

    Attributes:
        index: number of the test image.
        maps: float32 [S, S] from 0 to 1, by number of the class whose score they are about.
    """

    index: int
    maps: Mapping[int, NDArray[np.float32]]


@track("drawing the report")
def build_report(facts: RunFacts, images: NDArray[np.uint8] | str, saliency: Sequence[Saliency] = ()) -> str:
    """Build the page. All that it shows is escaped: names of runs and classes are others' to choose.

    Args:
        images: uint8 [N, 3, S, S], the test set; or the reason why it cannot be shown.
        saliency: of the images that somebody asked for.
    """
    template = Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    record, evaluation = facts.record, facts.evaluation
    is_large = len(evaluation["per_class"]) > MAX_NARROW
    return template.substitute(
        title=escape(f"{record['experiment_name']} / {record['run_name']}"),
        subtitle=_build_subtitle(record),
        figures=_build_figures(evaluation),
        notes=_build_notes(record["data"].get("notes", [])),
        curves=_build_curves(facts),
        classes=_build_classes(evaluation),
        confusion_matrix=_build_picture(
            lambda theme: draw_confusion_matrix(evaluation, theme),
            "Confusion matrix: the part of each true class's images that was predicted as each class",
        ),
        matrix_width="wide" if is_large else "",
        confusions_width="" if is_large else "wide",
        confusions=_build_confusions(evaluation) + _build_order(evaluation),
        reliability=_build_picture(
            lambda theme: draw_reliability(
                facts.probabilities, facts.labels, evaluation["expected_calibration_error"], theme
            ),
            "Reliability diagram: accuracy by confidence, the probability of the predicted class",
        ),
        mistakes=_build_mistakes(facts, images),
        saliency=_build_saliency(facts, images, saliency),
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
    """Find the misclassified images with the highest confidence, the highest first."""
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
    """Build the list of metrics, without those that say nothing of this run."""
    views = evaluation["views"]
    single_view = {"test accuracy, single view": _format_percentage(evaluation["accuracy_single_view"])}
    top5 = {"top-5 accuracy": _format_percentage(evaluation["top5_accuracy"])}
    figures = {
        f"test accuracy, {describe_views(views)}": _format_percentage(evaluation["accuracy"]),
        **(single_view if views != "one" else {}),
        **(top5 if len(evaluation["per_class"]) >= MIN_TOP5_CLASSES else {}),
        "test loss (cross entropy)": f"{evaluation['loss']:.4f}",
        "expected calibration error": _format_percentage(evaluation["expected_calibration_error"]),
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


_NUMBER = ' class="number"'


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
    heading = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("class", ""),
            ("accuracy", ""),
            *((each, _NUMBER) for each in ("precision", "F1", "images")),
        )
    )
    return f'<table class="classes"><thead><tr>{heading}</tr></thead>' f"<tbody>{''.join(rows)}</tbody></table>"


def _build_confusions(evaluation: dict[str, Any]) -> str:
    per_class = evaluation["per_class"]
    rows = [
        f"<tr><td>{escape(true)}</td><td>{escape(predicted)}</td>"
        f'<td class="number">{images:,} of {per_class[true]["support"]:,}</td></tr>'
        for true, predicted, images in find_confusions(evaluation)
    ]
    if not rows:
        return "<p>No test image is misclassified.</p>"
    heading = f'<th scope="col">true class</th><th scope="col">predicted class</th><th scope="col"{_NUMBER}>images</th>'
    return f'<table><thead><tr>{heading}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _build_order(evaluation: dict[str, Any]) -> str:
    """List the classes in the order of the confusion matrix where they are too many for names in it."""
    names = list(evaluation["per_class"])
    if len(names) <= MAX_NAMED:
        return ""
    order = order_by_similarity(np.asarray(evaluation["confusion_matrix"], dtype=np.float64))
    items = "".join(f"<li>{escape(names[label])}</li>" for label in order)
    return f"<details><summary>The classes in the order of the matrix</summary><ol>{items}</ol></details>"


def _build_mistakes(facts: RunFacts, images: NDArray[np.uint8] | str) -> str:
    if isinstance(images, str):
        return f'<p class="muted">The test images cannot be shown: {escape(images)}</p>'
    indices = find_surest_mistakes(facts.probabilities, facts.labels)
    if not indices:
        return "<p>No test image is misclassified.</p>"
    items = [
        f"<li>{_build_image(facts, images, index)}"
        f"{_build_answer(facts, index, int(facts.probabilities[index].argmax()))}</li>"
        for index in indices
    ]
    return f'<ul class="mistakes">{"".join(items)}</ul>'


def _build_image(facts: RunFacts, images: NDArray[np.uint8], index: int) -> str:
    true = escape(list(facts.evaluation["per_class"])[facts.labels[index]])
    source = _encode_image(images[index])
    return f'<img src="{source}" alt="test image {index}: {true}" width="96" height="96">'


def _build_answer(facts: RunFacts, index: int, predicted: int) -> str:
    """Say what an image was predicted as and is, each with its probability."""
    names, row, label = list(facts.evaluation["per_class"]), facts.probabilities[index], int(facts.labels[index])
    kind = "wrong" if predicted != label else "right"
    confidence, other = (_format_percentage(row[each], 1).replace(" ", "\u00a0") for each in (predicted, label))
    return (
        f'<span class="{kind}"><b>{escape(names[predicted])}</b> {confidence}</span>'
        f"<span>true: {escape(names[label])} {other}</span>"
        f'<span class="muted">test image {index}</span>'
    )


def _build_saliency(facts: RunFacts, images: NDArray[np.uint8] | str, saliency: Sequence[Saliency]) -> str:
    if not saliency or isinstance(images, str):
        return ""
    names = list(facts.evaluation["per_class"])
    colours = matplotlib.colormaps["cividis"]  # of even steps to the colour-blind, too
    items = []
    for each in saliency:
        maps = "".join(
            f'<img src="{_encode_image((255 * colours(values)[:, :, :3]).astype(np.uint8).transpose(2, 0, 1))}" '
            f'alt="saliency of test image {each.index} for {escape(names[label])}" width="96" height="96">'
            f"<span>for {escape(names[label])}</span>"
            for label, values in each.maps.items()
        )
        answer = _build_answer(facts, each.index, int(facts.probabilities[each.index].argmax()))
        items.append(f"<li>{_build_image(facts, images, each.index)}{answer}{maps}</li>")
    words = (
        "The brighter a pixel, the more the score of the class depends on it "
        "(SmoothGrad: the gradient of the logit, averaged over noisy copies)."
    )
    listed = f'<p class="muted">{words}</p><ul class="mistakes">{"".join(items)}</ul>'
    return f'<section class="wide">\n<h2>Saliency</h2>\n{listed}\n</section>'


_MARKS = {"equal": "\u2713", "different": "\u2717", "missing": "\u2717", "unchecked": "?"}


def _build_links(links: Sequence[Link]) -> str:
    """Draw the provenance: from the model to what it was made of, each link with whether it was checked."""
    items = [
        f'<li class="{link.state}"><b>{_MARKS[link.state]} {escape(link.name)}: {link.state}</b>'
        f'<span class="digest">{escape(link.digest[:12])}</span><span>{escape(link.what)}</span>'
        f'<span class="muted">{escape(link.reason)}</span></li>'
        for link in links
    ]
    listed = f'<ol class="links">{"".join(items)}</ol>'
    return f'<section class="wide">\n<h2>Provenance</h2>\n{listed}\n</section>' if items else ""


def _build_identity(record: dict[str, Any]) -> str:
    data, code, environment, machine = (record[part] for part in ("data", "code", "environment", "machine"))
    changes = {True: ", with uncommitted changes", False: "", None: ""}[code.get("uncommitted_changes")]
    counts = [f"{data[f'num_{part}']:,} to {verb}" for part, verb in _PARTS if data.get(f"num_{part}")]
    described = {
        "data": (f"{data['name']}, {len(data['classes'])} classes: {', '.join(counts)}", data["digest"]),
        "code": (f"version {code['version']}, commit {code.get('commit') or 'unknown'}{changes}", code["digest"]),
        "environment": (f"Python {environment['python']}", environment["digest"]),
        "machine class": (_list_values(machine["class"]), machine["digest"]),
        "can be verified on": (f"{describe_checkers(record)}: image_classifier verify RUN", ""),
        "initial weights": (
            (f"{record['pretrained']['path']}: {describe_head(record)}", record["pretrained"]["digest"])
            if record["pretrained"]
            else ("drawn from the seed", "")
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
    paragraphs = [f'<p>Digest of the weights: <span class="digest">{weights}</span></p>']
    if facts.chain:
        head = facts.chain[-1]
        breaks = sum("break" in line for line in facts.chain)
        links = f"{count(len(facts.chain), 'digest')} of the whole state"
        links += ", each over the one before it" if len(facts.chain) > 1 else ""
        links += f", {breaks} of them for a change of the machine" if breaks else ""
        paragraphs.append(
            f'<p>Head of the digest chain, at step {escape(str(head["step"]))}: '
            f'<span class="digest">{escape(str(head["digest"]))}</span><br><span class="muted">{links}</span></p>'
        )
    else:
        paragraphs.append('<p class="muted">There is no digest chain, as nothing was trained.</p>')
    commands = escape(f"image_classifier verify --files_only {run}  # seconds: every file is what was written")
    commands += "\n" + escape(f"image_classifier verify {run}  # trains it again: every bit is the same")
    block = f'<pre tabindex="0" role="group" aria-label="Commands that verify the run"><code>{commands}</code></pre>'
    return "\n".join([*paragraphs, block])


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
