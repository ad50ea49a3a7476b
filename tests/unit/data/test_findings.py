"""What is said of images that were fitted or left out."""

from __future__ import annotations

import json
import threading

import pytest

from image_classifier.access import Reading
from image_classifier.choices import Fit
from image_classifier.data.findings import Findings, Notebook, restore_findings


def build(fit: Fit, sizes: list[tuple[int, int]], left_out: list[str]) -> Findings:
    notebook = Notebook(Reading(fit=fit))
    for size in sizes:
        notebook.note_size(*size)
    notebook.left_out += left_out
    return notebook.summarize()


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ("squeeze", "; aspect ratios of up to 4.00 became 1 (--fit crop or --fit pad keeps them)"),
        ("crop", "; up to 75% of one was cut off"),
        ("pad", "; up to 75% of one is a black border"),
    ],
)
def test_sizes_and_the_change_of_the_sides_are_said(fit: Fit, said: str) -> None:
    findings = build(fit, [(300, 200)] * 2 + [(100, 400)], [])
    assert findings.describe() == [f"3 images were resized to 32 x 32, from 300 x 200 (2), 100 x 400 (1){said}"]


def test_of_many_sizes_the_most_frequent_are_listed() -> None:
    findings = build("squeeze", [(side, side) for side in range(40, 60)] + [(64, 64)] * 3, [])
    assert findings.num_fitted == 23 and next(iter(findings.sizes)) == "64 x 64" and len(findings.sizes) == 10
    (line,) = findings.describe()
    # Squares lose no ratio.
    assert line == "23 images were resized to 32 x 32, from 64 x 64 (3), 40 x 40 (1), 41 x 41 (1) and others"
    assert build("squeeze", [(64, 64)] * 2, []).describe() == ["2 images were resized to 32 x 32, from 64 x 64"]


def test_what_was_left_out_is_counted_and_named() -> None:
    findings = build("squeeze", [], ["a.png: damaged", "b.png: damaged"])
    assert findings.describe() == ["2 images were left out because they could not be read, such as a.png: damaged"]
    assert build("squeeze", [], []).describe() == []


def test_findings_come_back_from_json() -> None:
    findings = build("pad", [(300, 200)], ["a.png: damaged"])
    assert restore_findings(json.loads(json.dumps(findings.to_json()))) == findings


def test_no_size_is_lost_among_threads() -> None:
    notebook = Notebook(Reading())

    def note() -> None:
        for number in range(3000):
            notebook.note_size(number % 3 + 40, 40)

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(notebook.summarize().sizes) == {"40 x 40": 4000, "41 x 40": 4000, "42 x 40": 4000}
