"""Tests of drift: each finds what it is for, and together they are wrong as rarely as they say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier.monitoring.drift import DriftTest, compute_tests, correct, rank_by_drift
from image_classifier.published.reference import MEASURES, Reference, build_reference, embed, measure

CLASSES = tuple("abcd")
Sample = tuple[NDArray[np.uint8], NDArray[np.float32]]


def draw(number: int, seed: int, *, classes: NDArray[np.int64] | None = None, is_linked: bool = False) -> Sample:
    """Draw images of a colour each, and answers to them.

    Args:
        classes: predicted ones; drawn alike by default.
        is_linked: the bright images are those of the later classes.
    """
    generator = np.random.default_rng(seed)
    levels = generator.normal(120, 20, (number, 1, 1, 3))
    if classes is None:
        classes = generator.integers(0, len(CLASSES), number)
    if is_linked:
        levels = levels[np.argsort(levels.mean((1, 2, 3)))]
        classes = np.sort(classes)
    images = np.clip(levels + generator.normal(0, 10, (number, 32, 32, 3)), 0, 255).astype(np.uint8)
    logits = generator.normal(0, 1, (number, len(CLASSES)))
    logits[np.arange(number), classes] += 4
    shares = np.exp(logits)
    return images, (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> Reference:
    images, probabilities = draw(1500, seed=0)
    return build_reference(CLASSES, images.transpose(0, 3, 1, 2), probabilities)


def find_drifts(tests: list[DriftTest], level: float = 0.01) -> set[str]:
    return {test.name for test in tests if test.p_value <= level}


def test_undisturbed_windows_are_seldom_taken_for_drift(reference: Reference) -> None:
    tests = [compute_tests(reference, *draw(200, seed)) for seed in range(1, 11)]
    assert [test.name for test in tests[0]] == ["classes", *MEASURES, "embeddings"]
    assert sum(bool(find_drifts(each, level=0.1)) for each in tests) <= 4  # which is so in 99.8 % of all tries


def test_p_values_are_corrected_step_by_step() -> None:
    assert correct([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct([0.9, 0.8]) == [1, 1]


def test_the_same_window_gives_the_same_figures(reference: Reference) -> None:
    assert compute_tests(reference, *draw(200, 1)) == compute_tests(reference, *draw(200, 1))


def test_other_light_is_found(reference: Reference) -> None:
    images, probabilities = draw(200, 1)
    tests = compute_tests(reference, np.clip(images.astype(int) + 20, 0, 255).astype(np.uint8), probabilities)
    assert find_drifts(tests) == {"brightness", "embeddings"}
    (test,) = (test for test in tests if test.name == "brightness")
    assert test.effect > 0.3 and test.stability is not None and test.stability > 0.25


def test_other_classes_are_found(reference: Reference) -> None:
    tests = compute_tests(reference, *draw(200, 1, classes=np.arange(200) % 3))
    assert find_drifts(tests) == {"classes", "embeddings"}
    assert tests[0].effect == pytest.approx(0.25, abs=0.03)  # the share of the class that is missing


def test_less_sure_answers_are_found(reference: Reference) -> None:
    images, probabilities = draw(200, 1)
    softer = probabilities**0.5
    tests = compute_tests(reference, images, softer / softer.sum(axis=1, keepdims=True))
    assert find_drifts(tests) == {"confidence", "embeddings"}


def test_what_no_measure_shows_by_itself_is_found_by_the_embeddings(reference: Reference) -> None:
    assert find_drifts(compute_tests(reference, *draw(600, 1, is_linked=True))) == {"embeddings"}


def test_images_and_answers_that_are_all_alike_are_no_reason_to_fail() -> None:
    images, probabilities = np.full((150, 32, 32, 3), 7, np.uint8), np.tile(np.array([1, 0], np.float32), (150, 1))
    reference = build_reference("ab", images.transpose(0, 3, 1, 2), probabilities)
    tests = compute_tests(reference, images, probabilities)
    assert {test.p_value for test in tests} == {1}
    assert {test.effect for test in tests} == {0}


def test_rare_classes_are_taken_together() -> None:
    """Of a hundred classes most come once or never in a window: the approximation holds for all of them as one."""
    generator = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, 101)
    alarms = 0
    for _ in range(3):
        (images, first), (window, second) = (_answer(generator, weights, number) for number in (1000, 150))
        reference = build_reference([str(n) for n in range(100)], images.transpose(0, 3, 1, 2), first)
        alarms += "classes" in find_drifts(compute_tests(reference, window, second))
    assert alarms == 0


def _answer(generator: np.random.Generator, weights: NDArray[np.float64], number: int) -> Sample:
    images = np.zeros((number, 32, 32, 3), np.uint8)
    classes = generator.choice(len(weights), number, p=weights / weights.sum())
    return images, np.eye(len(weights), dtype=np.float32)[classes]


def test_the_strangest_images_are_those_that_the_reference_has_not(reference: Reference) -> None:
    images, probabilities = draw(200, 1)
    images[:30] = 255 - images[:30] // 8
    order = rank_by_drift(reference.sample, embed(measure(images, probabilities), probabilities))
    assert set(order[:20]) <= set(range(30))
