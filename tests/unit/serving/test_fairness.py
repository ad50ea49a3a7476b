"""The queue by caller: least attained service first, a lane for what is cheap, and no memory of who is gone."""

from __future__ import annotations

import threading
import time

import pytest

from image_classifier.serving import fairness
from image_classifier.serving.fairness import FairQueue


def take_all(queue: FairQueue[str], *, only_cheap: bool = False) -> list[str]:
    """Take what waits, each for a moment, on this thread."""
    queue.close()
    taken = []
    while (item := queue.take(only_cheap=only_cheap)) is not None:
        taken.append(item)
        time.sleep(0.002)
    return taken


def test_who_has_used_the_least_time_is_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "a4"):
        queue.put(item, "a", is_cheap=False)
    for item in ("b1", "b2"):
        queue.put(item, "b", is_cheap=True)
    queue.put("c1", "c", is_cheap=False)
    taken = take_all(queue)
    assert taken[:3] == ["a1", "b1", "c1"] and taken[-2:] == ["a3", "a4"] and sorted(taken) == sorted({*taken})


def test_time_that_is_being_used_counts() -> None:
    """One thread is at an image of a caller, so that another takes that of the next."""
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2"):
        queue.put(item, "a", is_cheap=False)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        assert queue.take(only_cheap=False) == "a1"
        taken.set()
        assert done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(20)
    queue.put("b1", "b", is_cheap=False)
    assert queue.take(only_cheap=False) == "b1"
    assert len(queue.list_began()) == 2
    done.set()
    thread.join()


def test_what_was_used_long_ago_counts_less() -> None:
    caller: fairness._Caller[str] = fairness._Caller()
    caller.charge(8.0, now=100.0)
    assert caller.count_seconds(100.0) == 8.0
    assert caller.count_seconds(100.0 + 3 * fairness.HALF_LIFE_S) == pytest.approx(1.0)


def test_a_lane_takes_what_is_cheap_and_nothing_else() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.put(f"costly {number}", "a", is_cheap=False)
        queue.put(f"cheap {number}", "a", is_cheap=True)
    assert take_all(queue, only_cheap=True) == ["cheap 0", "cheap 1", "cheap 2"]
    assert take_all(queue) == ["costly 0", "costly 1", "costly 2"]


def test_callers_who_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_CALLERS", 10)
    queue: FairQueue[str] = FairQueue()
    for number in range(5):
        queue.put("waits", f"patient {number}", is_cheap=False)
    for number in range(100):
        queue.put("item", f"caller {number}", is_cheap=True)
        assert queue.take(only_cheap=True) == "item"
        assert len(queue._callers) <= 10
    assert {f"patient {number}" for number in range(5)} < queue._callers.keys()


def test_a_thread_ends_only_when_none_can_put_anything_back() -> None:
    """Who finds that an image is costly lets it wait again, when the queue is closed, too."""
    queue: FairQueue[str] = FairQueue()
    queue.put("a", "", is_cheap=True)
    assert queue.take(only_cheap=True) == "a"
    queue.close()
    taken: list[str | None] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.take(only_cheap=False), queue.take(only_cheap=False)]))
    thread.start()
    queue.put("a", "", is_cheap=False)
    assert queue.take(only_cheap=True) is None
    thread.join(20)
    assert taken == ["a", None]
