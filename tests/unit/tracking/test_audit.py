"""Segments that are drawn: nobody could choose them before, and the chance to find a false one is as it is said."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from image_classifier.tracking.audit import Audit, compute_detection, draw_segments, list_segments


@pytest.mark.parametrize(
    ("total", "drawn", "false"), [(8, 4, 1), (8, 4, 4), (5, 2, 3), (6, 1, 2), (4, 4, 1), (3, 1, 1)]
)
def test_the_chance_is_that_of_all_draws(total: int, drawn: int, false: int) -> None:
    draws = list(combinations(range(total), drawn))
    caught = sum(any(place < false for place in draw) for draw in draws)
    assert compute_detection(total, drawn, false) == pytest.approx(caught / len(draws))


def test_segments_lie_between_checkpoints_whose_states_have_digests() -> None:
    chain: list[dict[str, Any]] = [{"step": step, "tensors": {}} for step in (100, 200, 300, 350)]
    chain.insert(1, {"step": 150, "break": {}})
    assert list_segments([50, 100, 150, 200, 350], chain) == [(0, 100), (100, 200), (200, 350)]
    assert list_segments([], chain) == []


def test_every_draw_is_as_probable_as_any_other_and_can_be_repeated() -> None:
    segments = [(number, number + 1) for number in range(6)]
    draws = [draw_segments(segments, 2, "0" * 64, str(nonce)) for nonce in range(3000)]
    assert draws == [draw_segments(segments, 2, "0" * 64, str(nonce)) for nonce in range(3000)]
    assert all(len(draw) == 2 and draw[0] < draw[1] for draw in draws)
    counts = [draws.count(draw) for draw in set(draws)]
    assert len(counts) == 15 and min(counts) > 140 and max(counts) < 260  # 200 each, give or take
    assert draw_segments(segments, 2, "1" * 64, "0") in draws and draw_segments(segments, 6, "", "") == tuple(segments)


def test_what_was_drawn_is_said_with_the_chances() -> None:
    lines = Audit(8, ((0, 1), (3, 4), (4, 5), (7, 8)), 8, "nonce").describe()
    assert lines[0] == "4 of 8 segments were drawn from the manifest's digest and the nonce nonce"
    assert lines[1] == (
        "if some of the 8 were false, one would have been caught: of 1 with probability 50.0%, 2 with probability "
        "78.6%, 4 with probability 98.6%"
    )
