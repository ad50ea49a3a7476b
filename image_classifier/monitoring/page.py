"""Builds the drift report: test results, and captured images that show drift, in one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.monitoring.accuracy import Accuracy
from image_classifier.monitoring.drift import DriftTest, count_classes, rank_by_drift
from image_classifier.monitoring.window import Window
from image_classifier.published.reference import (
    NUM_SAMPLES,
    Reference,
    choose_evenly,
    count_both,
    embed,
    find_edges,
    measure,
)

NUM_SHOWN = 3
"""Minimum number of tests whose images are shown."""
_NUM_IMAGES = 15
_MAX_BARS = 12
_TILE = 96  # pixels, at most


@dataclass(frozen=True)
class _Change:
    """A change that a test found, and images that show it.

    Attributes:
        shares: fraction of the window and fraction of the reference, by name of the bin.
        rows: indices of images in the window.
    """

    heading: str
    shares: Mapping[str, tuple[float, float]]
    rows: NDArray[np.int64]


def build_page(
    title: str,
    facts: Mapping[str, str],
    tests: Sequence[DriftTest],
    level: float,
    reference: Reference,
    window: Window,
    accuracy: Accuracy | None = None,
) -> str:
    """Build the page. All names and values are escaped.

    Args:
        facts: descriptions of the comparison, by name.
        level: significance level of the tests.
    """
    template = Template(resources.files(__package__).joinpath("drift.html").read_text(encoding="utf-8"))
    ordered = order_tests(tests)
    num_found = sum(test.p_value <= level for test in tests)
    changes = iterate_changes(ordered[: max(num_found, NUM_SHOWN)], reference, window)
    return template.substitute(
        title=escape(title),
        facts="\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()),
        tests="\n".join(_build_row(test, level) for test in ordered),
        changes="\n".join(_build_change(change, reference.classes, window) for change in changes),
        accuracy="" if accuracy is None else _build_accuracy(accuracy),
    )


def order_tests(tests: Sequence[DriftTest]) -> list[DriftTest]:
    """Order tests by p-value, then by descending effect."""
    return sorted(tests, key=lambda test: (test.p_value, -test.effect))


def iterate_changes(tests: Sequence[DriftTest], reference: Reference, window: Window) -> Iterator[_Change]:
    """Yield the change of each test, with the images of the window that show it best."""
    measures = measure(window.images, window.probabilities)
    for test in tests:
        if test.name == "classes":
            yield _describe_classes(reference, window)
        elif test.name == "embeddings":
            sampled = choose_evenly(len(window), NUM_SAMPLES)
            chosen = {name: values[sampled] for name, values in measures.items()}
            ranked = rank_by_drift(reference.sample, embed(chosen, window.probabilities[sampled]))
            yield _Change("embeddings: images unlike those of the reference", {}, sampled[ranked[:_NUM_IMAGES]])
        else:
            yield _describe_measure(test.name, reference, measures[test.name])


def _describe_classes(reference: Reference, window: Window) -> _Change:
    counts, expected = count_classes(window.probabilities), reference.class_counts
    shares, expected_shares = counts / counts.sum(), expected / expected.sum()
    shown = np.sort(np.argsort(-np.abs(shares - expected_shares), kind="stable")[:_MAX_BARS])
    more = int(np.argmax(shares - expected_shares))
    rows = np.flatnonzero(window.probabilities.argmax(axis=1) == more)
    heading = f"classes: {_compare(shares[more], expected_shares[more])} are {reference.classes[more]}"
    named = {f"{number} {reference.classes[number]}": (shares[number], expected_shares[number]) for number in shown}
    return _Change(heading, named, rows[choose_evenly(len(rows), _NUM_IMAGES)])


def _describe_measure(name: str, reference: Reference, values: NDArray[np.float64]) -> _Change:
    quantiles = reference.quantiles[name]
    counts, expected = count_both(quantiles, values, reference.num_images)
    edges = find_edges(quantiles)
    shares, expected_shares = counts / counts.sum(), expected / expected.sum()
    texts = [f"{edge:.4g}" for edge in edges]
    ranges = [f"{low} to {high}" for low, high in zip(["–∞", *texts], [*texts, "∞"], strict=True)]
    if texts:
        ranges[0], ranges[-1] = f"below {texts[0]}", f"from {texts[-1]}"
    more = int(np.argmax(shares - expected_shares))
    rows = np.flatnonzero(np.searchsorted(edges, values, side="right") == more)
    heading = f"{name}: {_compare(shares[more], expected_shares[more])} have {name} {ranges[more]}"
    named = dict(zip(ranges, zip(shares, expected_shares, strict=True), strict=True))
    return _Change(heading, named, rows[choose_evenly(len(rows), _NUM_IMAGES)])


def _compare(share: float, expected: float) -> str:
    return f"{100 * share:.1f} % of the images instead of {100 * expected:.1f} %"


def _build_row(test: DriftTest, level: float) -> str:
    stability = "–" if test.stability is None else f"{test.stability:.3f}"
    is_drift = test.p_value <= level
    return (
        f'<tr class="{"drift" if is_drift else "same"}"><th scope="row">{test.name}</th><td>{test.method}</td>'
        f'<td class="number">{test.effect:.3f}</td><td class="number">{stability}</td>'
        f'<td class="number">{test.p_value:.2g}</td><td>{"drift" if is_drift else "none found"}</td></tr>'
    )


def _build_change(change: _Change, classes: Sequence[str], window: Window) -> str:
    largest = max([0.01, *(share for pair in change.shares.values() for share in pair)])
    bars = "".join(
        f"<tr><th>{escape(name)}</th><td>{_build_bar('window', share / largest)}"
        f'{_build_bar("reference", expected / largest)}</td><td class="number">{100 * share:.1f} %</td>'
        f'<td class="number muted">{100 * expected:.1f} %</td></tr>'
        for name, (share, expected) in change.shares.items()
    )
    table = f'<table class="bars">{bars}</table>' if bars else ""
    images = "".join(_build_figure(int(row), classes, window) for row in change.rows)
    return (
        f'<section><h2>{escape(change.heading)}</h2><div class="change">{table}<div class="images">{images}</div></div>'
        "</section>"
    )


def _build_bar(kind: str, part: float) -> str:
    return f'<div class="bar {kind}" style="width:{100 * part:.1f}%"></div>'


def _build_figure(row: int, classes: Sequence[str], window: Window) -> str:
    best = int(window.probabilities[row].argmax())
    caption = f"{classes[best]} {100 * window.probabilities[row, best]:.0f} %"
    place = f"{window.times[row]} UTC, request {window.request_ids[row]}"
    image = Image.fromarray(window.images[row])
    image.thumbnail((_TILE, _TILE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure title="{escape(place)}"><img src="data:image/png;base64,{content}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _build_accuracy(accuracy: Accuracy) -> str:
    rows = "".join(
        f'<tr><th scope="row">{each.start}</th><td class="number">{each.num_images:,}</td>'
        f'<td class="number">{100 * each.accuracy:.1f} %</td>'
        f'<td class="number">{100 * each.low:.1f} to {100 * each.high:.1f} %</td>'
        f'<td class="track"><div class="interval" style="margin-left:{100 * each.low:.1f}%;'
        f'width:{100 * (each.high - each.low):.1f}%"></div></td></tr>'
        for each in (*accuracy.periods, accuracy.total)
    )
    return (
        "<section><h2>Accuracy of labelled predictions</h2><table><thead><tr><th>UTC</th>"
        '<th class="number">labels</th><th class="number">accuracy</th><th class="number">95 % interval</th>'
        f'<th class="track">0 to 100 %</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )
