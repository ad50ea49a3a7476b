"""The statistics against published tables and exact arithmetic, and what is compared with what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import RunError
from image_classifier.tracking.compare import (
    compare_runs,
    compute_mcnemar_test,
    compute_t_probability,
    compute_t_quantile,
    compute_welch_test,
    describe_sample,
)
from image_classifier.tracking.layout import EVALUATION, PREDICTIONS
from image_classifier.tracking.reading import read_predictions
from tests.runs import CLASSES, write_run


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [  # two-sided; any table of Student's t
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.95, 10_000, 1.960),
        (0.90, 5, 2.015),
        (0.99, 3, 5.841),
        (0.999, 10, 4.587),
        (0.95, 3.7, 2.86752),  # of SciPy, as tables have whole degrees of freedom only
    ],
)
def test_t_quantiles_are_those_of_the_tables(probability: float, freedom: float, quantile: float) -> None:
    assert compute_t_quantile(probability, freedom) == pytest.approx(quantile, abs=5e-4)
    assert compute_t_probability(compute_t_quantile(probability, freedom), freedom) == pytest.approx(probability)


@given(st.floats(0, 50), st.floats(1, 500))
def test_t_probability_is_a_probability_and_closed_where_there_is_a_closed_form(t: float, freedom: float) -> None:
    assert -1e-9 <= compute_t_probability(t, freedom) <= 1 + 1e-9
    assert compute_t_probability(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-9)  # Cauchy's
    assert compute_t_probability(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_sign_test(only_first: int, only_second: int) -> None:
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    assert compute_mcnemar_test(only_first, only_second) == pytest.approx(min(1, 2 * tail / 2**n))


def test_mcnemar_with_many_images_is_near_the_chi_squared_approximation() -> None:
    only_first, only_second = 4000, 4200
    chi_squared = (abs(only_first - only_second) - 1) ** 2 / (only_first + only_second)  # Edwards, 1948
    approximation = math.erfc(math.sqrt(chi_squared / 2))
    assert compute_mcnemar_test(only_first, only_second) == pytest.approx(approximation, rel=0.01)


def test_welch_gives_the_figures_of_an_independent_implementation() -> None:
    test = compute_welch_test([3, 5, 7, 9, 11, 13, 6, 10], [12, 14, 16, 13, 11, 12])

    # scipy.stats.ttest_ind(second, first, equal_var=False) of SciPy 1.17.1
    assert test["difference"] == pytest.approx(5.0)
    assert test["p_value"] == pytest.approx(0.004088353458905125, rel=1e-9)
    assert test["interval"] == pytest.approx([1.9489032033798752, 8.051096796620126])


def test_samples_are_described_by_student_not_by_the_normal_distribution() -> None:
    described = describe_sample([0.50, 0.52, 0.54])
    assert described["mean"] == pytest.approx(0.52)
    assert described["standard_deviation"] == pytest.approx(0.02)
    assert described["interval"] == pytest.approx(
        [0.52 - 4.3027 * 0.02 / 3**0.5, 0.52 + 4.3027 * 0.02 / 3**0.5], abs=1e-5
    )
    assert describe_sample([0.5])["interval"] is None


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0.8, 0.01, (2000, 4))
    intervals = [describe_sample(list(sample))["interval"] for sample in samples]
    held = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert 0.935 <= held <= 0.965


def test_two_runs_are_compared_image_by_image(tmp_path: Path) -> None:
    better = write_run(tmp_path, "e/better", accuracy=0.8, num_images=1000, learning_rate=0.1)
    worse = write_run(tmp_path, "e/worse", accuracy=0.6, num_images=1000, learning_rate=0.2, predictions_seed=1)

    comparison = compare_runs([better, worse])

    (difference,) = comparison["differences"]
    (first, labels), (second, _) = read_predictions(better), read_predictions(worse)
    pairs = list(zip((first.argmax(1) == labels).tolist(), (second.argmax(1) == labels).tolist(), strict=True))
    assert difference["only_first_right"] == pairs.count((True, False))
    assert difference["only_second_right"] == pairs.count((False, True))
    assert difference["p_value"] < 1e-9
    assert difference["differ"] is True
    accuracies = [run["accuracy"] for run in comparison["runs"]]
    assert difference["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    assert comparison["settings"] == {"learning_rate": {"A": 0.1, "B": 0.2}}
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_a_run_and_its_repetition_do_not_differ(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "e/first"), write_run(tmp_path, "e/second")

    comparison = compare_runs([first, second])

    assert comparison["differences"][0]["p_value"] == 1
    assert comparison["differences"][0]["differ"] is False
    assert comparison["groups"][0]["figures"]["accuracy"]["interval"] is None  # one seed twice is no spread
    assert "more than once" in comparison["notes"][0]


def test_seeds_form_groups_and_groups_are_compared(tmp_path: Path) -> None:
    low = [write_run(tmp_path, f"e/low{s}", accuracy=0.70, seed=s, num_images=1000) for s in range(4)]
    high = [write_run(tmp_path, f"e/high{s}", accuracy=0.85, seed=s, flip="none", num_images=1000) for s in range(3)]

    comparison = compare_runs([*low, *high])

    assert [group["seeds"] for group in comparison["groups"]] == [[0, 1, 2, 3], [0, 1, 2]]
    accuracies = [run["accuracy"] for run in comparison["runs"] if run["group"] == "A"]
    assert comparison["groups"][0]["figures"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    (difference,) = comparison["differences"]
    assert (difference["first"], difference["second"], difference["test"]) == ("A", "B", "Welch")
    assert difference["interval"][0] < 0.15 < difference["interval"][1]
    assert difference["differ"] is True
    assert set(comparison["groups"][0]["class_accuracy"]) == set(CLASSES)


def test_a_single_run_against_several_seeds_is_not_judged(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path, f"e/s{s}", seed=s) for s in range(2)]
    single = write_run(tmp_path, "e/single", cutout=8)

    comparison = compare_runs([*seeds, single])

    assert comparison["differences"] == []
    assert "group B has only one seed" in comparison["notes"][0]


def test_several_comparisons_are_corrected_by_holm(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, f"e/{i}", accuracy=accuracy, cutout=i, predictions_seed=i, num_images=500)
        for i, accuracy in enumerate([0.8, 0.74, 0.8])
    ]

    differences = compare_runs(runs)["differences"]

    p_values = sorted(difference["p_value"] for difference in differences)
    corrected = sorted(difference["corrected_p_value"] for difference in differences)
    expected = np.maximum.accumulate([min(1, p * factor) for p, factor in zip(p_values, (3, 2, 1), strict=True)])
    assert corrected == pytest.approx(list(expected))


@pytest.mark.parametrize("part", ["code", "environment", "pretrained"])
def test_other_code_environment_or_weights_are_another_group(tmp_path: Path, part: str) -> None:
    first = write_run(tmp_path, "e/first")
    second = write_run(tmp_path, "e/second", seed=1, changes={part: {"digest": "f" * 64}})

    comparison = compare_runs([first, second])

    assert len(comparison["groups"]) == 2
    assert comparison["identity"][part]["e/second"] == "f" * 64


def test_another_machine_is_said_but_makes_no_other_group(tmp_path: Path) -> None:
    first = write_run(tmp_path, "e/first")
    second = write_run(tmp_path, "e/second", seed=1, changes={"machine": {"class": {}, "digest": "f" * 64}})

    comparison = compare_runs([first, second])

    assert len(comparison["groups"]) == 1
    assert list(comparison["identity"]) == ["machine"]


def test_different_data_is_refused_unless_allowed_and_never_tested(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"e/{data}", data=data) for data in ("cifar10", "sample")]

    with pytest.raises(RunError, match="different data .*--allow_different_data"):
        compare_runs(runs)
    comparison = compare_runs(runs, allow_different_data=True)

    assert comparison["differences"] == []
    assert "different test images" in comparison["notes"][0]


def test_runs_that_resized_their_images_differently_are_told_apart_by_the_option(tmp_path: Path) -> None:
    first = write_run(tmp_path, "e/first", data="32")
    second = write_run(tmp_path, "e/second", data="64", image_size=64, changes={"execution": {"fit": "pad"}})
    with pytest.raises(
        RunError, match="; --image_size was 32 and 64 and --fit was squeeze and pad, so compare their validation"
    ):
        compare_runs([first, second])


def test_equal_accuracies_of_all_seeds_are_not_judged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"e/{c}{s}", accuracy=1.0, seed=s, cutout=c) for c in (0, 8) for s in range(2)]

    (difference,) = compare_runs(runs)["differences"]

    assert difference["difference"] == 0
    assert difference["p_value"] is None
    assert difference["differ"] is None


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_evaluation(folder: Path) -> None:
    (folder / EVALUATION).write_bytes((folder / EVALUATION).read_bytes()[:-10])


def zero_predictions(folder: Path) -> None:
    (folder / PREDICTIONS).write_bytes(bytes((folder / PREDICTIONS).stat().st_size))


def flip_bit_of_predictions(folder: Path) -> None:
    content = bytearray((folder / PREDICTIONS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / PREDICTIONS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_manifest, "not a finished run"),
        (cut_evaluation, "was changed after the run"),
        (zero_predictions, "missing or damaged"),
        (flip_bit_of_predictions, "missing or damaged"),
    ],
)
def test_an_unfinished_or_changed_run_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    first, second = write_run(tmp_path, "e/first"), write_run(tmp_path, "e/second")
    damage(second)

    with pytest.raises(RunError, match=message):
        compare_runs([first, second])


def test_one_run_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)

    with pytest.raises(RunError, match="two or more runs"):
        compare_runs([run])
    with pytest.raises(RunError, match="named twice"):
        compare_runs([run, tmp_path / "experiment" / ".." / "experiment" / "run"])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / experiments) for experiments in ("here", "there")]

    names = [run["name"] for run in compare_runs(runs)["runs"]]

    assert names == ["experiment/run", str(runs[1])]
