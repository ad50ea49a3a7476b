"""Statistical tests, with effect sizes, for drift of captured images and predictions from the test set.

Each test compares a window of captured images with the reference that `publish` wrote. Holm's procedure corrects the
p-values, so that the family-wise error rate is at most the level. The procedure of Benjamini and Hochberg would give
more false positives when one measure drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.extras import load_extra
from image_classifier.published.reference import (
    MEASURES,
    NUM_SAMPLES,
    Reference,
    choose_evenly,
    compute_stability_index,
    count_both,
    embed,
    get_class_bins,
    measure,
)

MIN_IMAGES = 100
"""Smallest window. Smaller ones have little power, and too few images per class for a chi-square test."""

NUM_PERMUTATIONS = 1999
_SEED = 0
_MIN_EXPECTED = 5
"""Expected count per class below which the chi-square approximation is poor (Cochran 1954)."""


@dataclass(frozen=True)
class DriftTest:
    """Result of one test against the reference.

    Attributes:
        name: `classes`, a measure of `published.reference`, or `embeddings`.
        effect: effect size from 0 to 1: total variation distance of the classes, Kolmogorov-Smirnov statistic D of a
            measure, or maximum mean discrepancy (MMD) of embeddings.
        stability: population stability index; None for embeddings, which have no bins.
        p_value: in results of `compute_tests` corrected for the number of tests.
    """

    name: str
    method: str
    effect: float
    stability: float | None
    p_value: float


def compute_tests(
    reference: Reference, images: NDArray[np.uint8], probabilities: NDArray[np.float32]
) -> list[DriftTest]:
    """Compare a window of images, uint8 [N, S, S, 3], and their probabilities, float32 [N, C], with the reference.

    Returns:
        The tests in a fixed order, with corrected p-values.

    Raises:
        SettingsError: SciPy is not installed.
    """
    stats = load_extra("scipy.stats", "drift")
    measures = measure(images, probabilities)
    tests = [_test_classes(stats, reference, probabilities)]
    tests += [_test_measure(stats, reference, name, measures[name]) for name in MEASURES]
    sampled = choose_evenly(len(images), NUM_SAMPLES)
    embeddings = embed({name: values[sampled] for name, values in measures.items()}, probabilities[sampled])
    tests.append(_test_embeddings(reference.sample, embeddings))
    corrected = correct([test.p_value for test in tests])
    return [replace(test, p_value=p_value) for test, p_value in zip(tests, corrected, strict=True)]


def correct(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple testing (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(stepped, 1)
    return [float(each) for each in corrected]


def count_classes(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count the predictions of each class: float32 [N, C] to int64 [C]."""
    return np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])


def _test_classes(stats: Any, reference: Reference, probabilities: NDArray[np.float32]) -> DriftTest:
    table = np.stack([count_classes(probabilities), reference.class_counts])
    bins = get_class_bins(reference.class_counts)
    stability = compute_stability_index(*(np.bincount(bins, row).astype(np.int64) for row in table))
    shares = table / table.sum(axis=1, keepdims=True)
    effect = float(np.abs(shares[0] - shares[1]).sum() / 2)
    expected = table.sum(axis=0) * table.sum(axis=1).min() / table.sum()
    is_rare = expected < _MIN_EXPECTED
    if is_rare.any():
        table = np.concatenate([table[:, ~is_rare], table[:, is_rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return DriftTest("classes", "chi-square", effect, stability, 1.0)
    p_value = float(stats.chi2_contingency(table, correction=False).pvalue)
    return DriftTest("classes", "chi-square", effect, stability, p_value)


def _test_measure(stats: Any, reference: Reference, name: str, values: NDArray[np.float64]) -> DriftTest:
    """Test whether a measure has the distribution that the reference's quantiles describe."""
    quantiles = reference.quantiles[name]
    distance = float(stats.ks_2samp(values, quantiles, method="asymp").statistic)
    # As in ks_2samp, but with the number of test images instead of the number of quantiles.
    number = len(values) * reference.num_images / (len(values) + reference.num_images)
    p_value = float(stats.kstwo.sf(distance, round(number)))
    stability = compute_stability_index(*count_both(quantiles, values, reference.num_images))
    return DriftTest(name, "Kolmogorov-Smirnov", distance, stability, p_value)


def _test_embeddings(sample: NDArray[np.float64], embeddings: NDArray[np.float64]) -> DriftTest:
    """Test whether two samples have the same distribution, by permutations of the MMD (Gretton et al. 2012)."""
    kernel = compute_kernel(sample, embeddings)
    weights = np.concatenate([np.full(len(sample), -1 / len(sample)), np.full(len(embeddings), 1 / len(embeddings))])
    drawn = np.random.default_rng(_SEED).permuted(np.tile(weights, (NUM_PERMUTATIONS, 1)), axis=1)
    squares = np.einsum("bi,bi->b", drawn @ kernel, drawn)
    square = weights @ kernel @ weights
    # Tolerate rounding: equal permutations may differ by the order of summation.
    p_value = (1 + np.count_nonzero(squares >= square * (1 - 1e-9))) / (1 + NUM_PERMUTATIONS)
    return DriftTest("embeddings", "MMD", float(max(square, 0)) ** 0.5, None, float(p_value))


def compute_kernel(sample: NDArray[np.float64], embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the Gaussian kernel of all embeddings, with those of the sample first: float64 [M + N, M + N].

    Each dimension is scaled to a standard deviation of 1 over both sets, and the bandwidth is the median distance.
    Neither depends on the split into sets, as the permutation test requires.
    """
    both = np.concatenate([sample, embeddings])
    both = (both - both.mean(axis=0)) / np.maximum(both.std(axis=0), 1e-9)
    norms = (both * both).sum(axis=1)
    squares = np.maximum(norms[:, None] + norms - 2 * both @ both.T, 0)
    kernel: NDArray[np.float64] = np.exp(-squares / max(float(np.median(squares)), 1e-9))
    return kernel


def rank_by_drift(sample: NDArray[np.float64], embeddings: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order the window's images by the MMD witness function: largest density gain over the reference first."""
    kernel = compute_kernel(sample, embeddings)[len(sample) :]
    witness = kernel[:, len(sample) :].mean(axis=1) - kernel[:, : len(sample)].mean(axis=1)
    return np.argsort(-witness, kind="stable")
