"""What one caller may ask for, on a clock of the test's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.serving.limits import MAX_CALLERS, CallerLimits, count_pixels, find_caller
from tests.serving import build_png_of, encode


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def count_admitted(limits: CallerLimits, caller: str, number: int) -> int:
    """Count how many of some requests at once are taken."""
    return sum(limits.admit(caller) == 0.0 for _ in range(number))


def test_without_limits_everybody_may_come_and_nobody_is_remembered() -> None:
    limits = CallerLimits(0, 0, Clock())
    assert not limits.is_on and count_admitted(limits, "a", 1000) == 1000
    limits.charge("a", 10**9)
    assert limits.admit("a") == 0.0 and len(limits) == 0


@pytest.mark.parametrize(("rate", "at_once"), [(0.25, 1), (1, 1), (5, 5), (7.5, 7)])
def test_a_second_of_requests_may_come_at_once_and_then_they_come_at_the_rate(rate: float, at_once: int) -> None:
    clock = Clock()
    limits = CallerLimits(rate, 0, clock)
    assert count_admitted(limits, "a", 20) == at_once
    admitted = 0
    for _ in range(1000):
        clock.now += 0.1
        admitted += count_admitted(limits, "a", 3)
    assert admitted == pytest.approx(100 * rate, abs=1.01)


def test_callers_do_not_share() -> None:
    limits = CallerLimits(1, 0, Clock())
    assert limits.admit("a") == 0.0 and limits.admit("a") > 0 and limits.admit("b") == 0.0


def test_what_is_refused_costs_nothing() -> None:
    clock = Clock()
    limits = CallerLimits(2, 0, clock)
    assert count_admitted(limits, "a", 1000) == 2
    clock.now += 0.5
    assert count_admitted(limits, "a", 1000) == 1


@given(st.floats(0.01, 1e6), st.floats(0, 1e9), st.integers(1, 50))
def test_who_waits_as_long_as_was_said_is_taken(rate: float, start: float, number: int) -> None:
    clock = Clock()
    clock.now = start
    limits = CallerLimits(rate, rate, clock)
    for _ in range(number):
        limits.charge("a", 17)
        wait_s = limits.admit("a")
        clock.now += wait_s * (1 + 1e-9) + 1e-6
        assert wait_s == 0.0 or limits.admit("a") == 0.0


def test_pixels_are_owed_and_waited_for() -> None:
    clock = Clock()
    limits = CallerLimits(0, 1000, clock)
    limits.charge("a", 1000)
    assert limits.admit("a") == 0.0
    limits.charge("a", 2500)
    assert limits.admit("a") == pytest.approx(2.5) and limits.admit("b") == 0.0
    clock.now += 2.4
    assert limits.admit("a") == pytest.approx(0.1)
    clock.now += 0.1
    assert limits.admit("a") == 0.0


def test_idle_time_is_worth_no_more_than_a_second() -> None:
    clock = Clock()
    limits = CallerLimits(10, 1000, clock)
    assert count_admitted(limits, "a", 100) == 10
    clock.now += 3600
    assert count_admitted(limits, "a", 100) == 10
    limits.charge("a", 3000)
    assert limits.admit("a") == pytest.approx(2.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = Clock()
    limits = CallerLimits(1, 0, clock)
    limits.admit("a")
    clock.now -= 100
    assert limits.admit("a") > 0


def test_who_came_longest_ago_is_forgotten_first() -> None:
    clock = Clock()
    limits = CallerLimits(1, 0, clock)
    for number in range(MAX_CALLERS):
        assert limits.admit(f"{number}") == 0.0
    assert limits.admit("0") > 0  # and so it is not the oldest
    assert limits.admit("another") == 0.0
    assert len(limits) == MAX_CALLERS
    assert limits.admit("0") > 0
    assert limits.admit("1") == 0.0  # forgotten


@pytest.mark.parametrize(
    ("name", "address", "caller"),
    [
        ("alice", "192.0.2.1", "alice"),
        ("", "192.0.2.1", "192.0.2.1"),
        ("", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("", "2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("", "2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("", "::ffff:192.0.2.1", "192.0.2.1"),
        ("", "fe80::1%eth0", "fe80::/64"),
        ("", "unix:" + 100 * "x", "unix:" + 59 * "x"),
        ("", "", ""),
        ("", None, ""),
    ],
)
def test_a_caller_is_a_name_or_else_a_network(name: str, address: str | None, caller: str) -> None:
    assert find_caller(name, address) == caller


def test_pixels_are_counted_by_the_head_of_a_file() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    assert count_pixels(encode(image), ("PNG",)) == count_pixels(encode(image, "JPEG"), ("JPEG",)) == 600
    assert count_pixels(build_png_of(5000, 4000), ("PNG",)) == 20_000_000
    for content in (b"", b"no image", encode(image, "BMP"), build_png_of(20_000, 10_000)):
        assert count_pixels(content, ("PNG",)) == 0
