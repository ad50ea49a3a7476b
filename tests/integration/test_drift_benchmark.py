"""`benchmarks.drift`: windows that overlap nothing, changes that change, and what it makes of its figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drift import (
    LEVELS,
    STEPS,
    Answered,
    build_table,
    change_image,
    compute_interval,
    draw,
    draw_rows,
    measure_windows,
)
from tests.serving import draw_images


@pytest.fixture(scope="module")
def answered() -> Answered:
    """A test set of noise, answered at random."""
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(5), 800).astype(np.float32)
    return Answered(draw_images(800), probabilities, generator.integers(0, 5, 800), tuple("abcde"))


def test_no_image_is_in_a_window_and_in_its_reference(answered: Answered) -> None:
    for more in (0.0, 0.04):
        rows, half = draw_rows(answered, 300, seed=1, more=more)
        assert len(set(rows)) == 300 and len(half) == 400 and not set(rows) & set(half)
    labels = answered.labels[draw_rows(answered, 300, seed=1, more=0.04)[0]]
    before = answered.labels[draw_rows(answered, 300, seed=1)[0]]
    assert np.count_nonzero(labels == 3) > np.count_nonzero(before == 3)
    with pytest.raises(SystemExit, match="and not 270"):
        draw_rows(answered, 300, seed=1, more=0.9)


@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind != "class mix"])
def test_a_larger_step_changes_more(kind: str) -> None:
    image = draw_images(1)[0]
    changes = [np.abs(change_image(kind, step, image).astype(int) - image).mean() for step in STEPS[kind]]
    assert changes == sorted(changes) and changes[0] > 0


def test_windows_are_measured_and_shown(answered: Answered) -> None:
    darker = Answered(answered.images // 2, answered.probabilities, answered.labels, answered.classes)
    same, dark = (measure_windows(answered, changed, range(2), 150) for changed in (answered, darker))
    assert dark["found"] == {str(level): 2 for level in LEVELS}
    assert dark["found_by"]["brightness"] == 2 and dark["found_by"]["classes"] == 0
    assert same["found"][str(LEVELS[0])] == 0
    changed = {"brightness": {"2": same | {"accuracy": 0.5}, "32": dark | {"accuracy": 0.25}}}
    facts = {"model": "m", "accuracy": 0.5, "window": 150, "num_reference": 400, "processor": "p", "commit": "0" * 40}
    result = facts | {"undisturbed": {"150": same}, "changed": changed}
    table = build_table(result)
    assert "| 150 | 0 of 2 [0, 66] % |" in table
    assert "| 32 | 25.0 % | 2 of 2 [34, 100] % | brightness 2" in table
    assert draw(result | {"changed": changed | {"blur": changed["brightness"]}}).axes[1].get_title() == "blur"


def test_the_interval_is_wilsons() -> None:
    assert compute_interval(1, 100) == pytest.approx((0.0018, 0.0545), abs=1e-4)
