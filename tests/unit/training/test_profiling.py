"""The profile: of steps in the middle, readable, and not there when there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from image_classifier.training.loop import Step
from image_classifier.training.profiling import NUM_STEPS, NUM_STEPS_BEFORE, profile_steps


def take_steps(count: int) -> Iterator[Step]:
    for number in range(1, count + 1):
        product = torch.ones(64, 64) @ torch.ones(64, 64)
        yield Step(number, 0.1, product.mean(), torch.tensor(0), 1, 0.0)


def test_all_steps_are_yielded_and_some_are_profiled() -> None:
    saved: list[dict[str, bytes]] = []
    numbers = []
    for step in profile_steps(take_steps(20), saved.append):
        numbers.append(step.number)
        assert bool(saved) == (step.number > NUM_STEPS_BEFORE + NUM_STEPS)
    assert numbers == list(range(1, 21))
    (files,) = saved
    table = files["operators.txt"].decode()
    assert table.startswith(f"{NUM_STEPS} steps\n") and "aten::mm" in table and "[[64, 64], [64, 64]" in table
    names = [event["name"] for event in json.loads(files["trace.json"])["traceEvents"]]
    assert names.count("aten::mm") == NUM_STEPS


def test_a_run_that_ends_early_is_profiled_as_far_as_it_goes() -> None:
    saved: list[dict[str, bytes]] = []
    assert len(list(profile_steps(take_steps(NUM_STEPS_BEFORE + 2), saved.append))) == NUM_STEPS_BEFORE + 2
    assert saved[0]["operators.txt"].startswith(b"2 steps\n")


def test_a_run_of_too_few_steps_has_no_profile() -> None:
    saved: list[dict[str, bytes]] = []
    assert len(list(profile_steps(take_steps(NUM_STEPS_BEFORE), saved.append))) == NUM_STEPS_BEFORE
    assert saved == []
