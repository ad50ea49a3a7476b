"""Compares runs: different settings, differences of the results, and their significance."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import string
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import ImageClassifierError, RunError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.progress import track
from image_classifier.tracking.checking import check_finished
from image_classifier.tracking.reading import (
    find_dataset,
    read_epochs,
    read_evaluation,
    read_predictions,
    read_record,
)

CONFIDENCE = 0.95
"""Of the intervals; a difference is called one where its p-value is below 1 - CONFIDENCE."""

FIGURES = ("accuracy", "accuracy_single_view", "top5_accuracy", "loss", "expected_calibration_error", "macro_f1")
"""The figures of the test set that are put side by side."""

MAX_GROUPS = 40
"""More are not compared two by two: the 780 comparisons of so many are more than anybody reads."""


@dataclass(frozen=True)
class _Run:
    name: str
    folder: Path
    record: dict[str, Any]
    evaluation: dict[str, Any]
    figures: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.record["settings"]["seed"])

    @property
    def digest_format(self) -> Any:
        """Of the data's digest; versions before 2 did not record it."""
        return self.record["data"].get("digest_format", 1)

    @cached_property
    def conditions(self) -> str:
        """What must be equal for two runs to differ only by their seed; the machine is left out, as low bits are."""
        settings = {name: value for name, value in self.record["settings"].items() if name != "seed"}
        digests = [self.get_digest(part) for part in ("data", "pretrained", "code", "plugins", "environment")]
        return json.dumps([settings, digests], sort_keys=True)

    @cached_property
    def answers(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which test images the run has right, and their labels, [N] both."""
        probabilities, labels = read_predictions(self.folder)
        return probabilities.argmax(axis=1) == labels, labels

    def get_digest(self, part: str) -> str | None:
        description = self.record.get(part) or {}
        if part == "plugins" and description:
            return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        return description.get("digest")


@dataclass(frozen=True)
class _Group:
    name: str
    runs: list[_Run]  # equal but for their seeds

    @property
    def distinct(self) -> list[_Run]:
        """The first run of each seed: the same one twice would make the spread too small."""
        seeds: dict[int, _Run] = {}
        for run in self.runs:
            seeds.setdefault(run.seed, run)
        return list(seeds.values())

    def get_figures(self, name: str) -> list[float]:
        return [run.figures[name] for run in self.distinct]


@track("comparing")
def compare_runs(folders: Sequence[Path], *, allow_different_data: bool = False) -> dict[str, Any]:
    """Compare finished runs; those that differ only in their seed form a group.

    Two groups of several seeds are compared by Welch's t-test, which speaks for their settings. Two single runs are
    compared by McNemar's test on the same test images, which speaks for these two sets of weights only. Several
    comparisons are corrected by Holm's method.

    Returns:
        What `compare --json` prints: `runs`; `settings` (by group) and `identity` (by run) that differ; `groups` with
        mean, standard_deviation and interval of each figure; `differences` of accuracy, as fractions; `notes`.

    Raises:
        RunError: a run is missing, unfinished or named twice, or they have different data and that is not allowed.
    """
    runs = _load_runs(folders)
    _unify_data_digests(runs)
    if len(runs) < 2:
        raise RunError("a comparison needs two or more runs; name another one")
    if not allow_different_data:
        _check_same_data(runs)
    groups = _group_by_conditions(runs)
    differences, notes = _find_differences(groups)
    return {
        "format_version": 1,
        "runs": [
            {"name": run.name, "folder": str(run.folder), "group": group.name, "seed": run.seed, **run.figures}
            for group in groups
            for run in group.runs
        ],
        "settings": _find_differing_settings(groups),
        "identity": _find_differing_identity(runs),
        "groups": [
            {
                "name": group.name,
                "runs": [run.name for run in group.runs],
                "seeds": [run.seed for run in group.distinct],
                "figures": {name: describe_sample(group.get_figures(name)) for name in FIGURES},
                "class_accuracy": _average_class_accuracy(group),
            }
            for group in groups
        ],
        "differences": differences,
        "notes": notes,
    }


def describe_sample(values: Sequence[float]) -> dict[str, Any]:
    """Describe values by mean, standard deviation and Student's interval of the mean; None where one is too few."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "standard_deviation": None, "interval": None}
    deviation = float(np.std(values, ddof=1))
    margin = compute_t_quantile(CONFIDENCE, n - 1) * deviation / math.sqrt(n)
    return {"mean": mean, "standard_deviation": deviation, "interval": [mean - margin, mean + margin]}


def compute_welch_test(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Compute Welch's t-test: the difference of the means (second - first), its interval, and its p-value.

    Source: Welch, The Generalization of "Student's" Problem, Biometrika 34, 1947. Without any spread in either
    sample there is nothing to judge by: interval and p-value are None.
    """
    variances = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    difference = float(np.mean(second) - np.mean(first))
    total = sum(variances)
    if total == 0:
        return {"difference": difference, "interval": None, "p_value": None}
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, (first, second), strict=True))
    error = math.sqrt(total)
    margin = compute_t_quantile(CONFIDENCE, freedom) * error
    p_value = max(0.0, 1 - compute_t_probability(abs(difference) / error, freedom))
    return {"difference": difference, "interval": [difference - margin, difference + margin], "p_value": p_value}


def compute_mcnemar_test(only_first: int, only_second: int) -> float:
    """Compute the two-sided p-value of McNemar's test, from the images that only one of two networks has right.

    In its exact form, the sign test, however many the images are; the usual chi-squared with continuity correction
    only approximates it. Source: McNemar, Psychometrika 12, 1947; Fagerland et al., BMC Medical Research
    Methodology 13:91, 2013.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    k = np.arange(1, fewer + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    return min(1.0, 2 * float(np.exp(log_binomials - n * math.log(2)).sum()))


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def compute_t_probability(t: float, freedom: float) -> float:
    """Compute the probability that Student's t with 1 or more degrees of freedom lies between -t and t.

    By the angle arctan(t / sqrt(freedom)), over which the density is a power of the cosine (Abramowitz and Stegun,
    26.7.3), and Gauss's quadrature: exact to 1e-9 up to 10,000 degrees of freedom. SciPy would be a dependency for
    these two functions alone.
    """
    angle = math.atan(t / math.sqrt(freedom))
    integral = angle / 2 * float(_WEIGHTS @ np.cos(angle / 2 * (_NODES + 1)) ** (freedom - 1))
    return 2 / math.sqrt(math.pi) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) * integral


def compute_t_quantile(probability: float, freedom: float) -> float:
    """Compute the t for which Student's t lies between -t and t with this probability, by bisection."""
    low, high = 0.0, math.pi / 2  # angles, as t itself has no bound
    for _ in range(60):
        middle = (low + high) / 2
        if compute_t_probability(math.sqrt(freedom) * math.tan(middle), freedom) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _load_runs(folders: Sequence[Path]) -> list[_Run]:
    runs: dict[Path, _Run] = {}
    names: set[str] = set()
    for folder in folders:
        check_finished(folder)
        if folder.resolve() in runs:
            raise RunError(f"{folder} is named twice; a run cannot be compared with itself")
        record, evaluation, epochs = read_record(folder), read_evaluation(folder), read_epochs(folder)
        figures = {name: evaluation[name] for name in FIGURES if name != "macro_f1"}
        figures |= {
            "macro_f1": evaluation["macro"]["f1"],
            "train_accuracy": epochs[-1]["train_accuracy"] if epochs else None,
            "seconds": sum(epoch["seconds"] for epoch in epochs),
        }
        name = f"{record['experiment_name']}/{record['run_name']}"
        if name in names:
            name = str(folder)
        names.add(name)
        runs[folder.resolve()] = _Run(name, folder, record, evaluation, figures)
    return list(runs.values())


def _unify_data_digests(runs: Sequence[_Run]) -> None:
    """Give runs on the same data one digest of it: where theirs are of two formats, the data itself tells."""
    older = [run for run in runs if run.digest_format == 1]
    newer = {run.get_digest("data"): run for run in runs if run not in older} if older else {}
    for digest, run in newer.items():
        with suppress(ImageClassifierError):  # where the data is not there, the digests stay what they are
            snapshot = load_snapshot(*find_dataset(run.folder))
            for other in older:
                recorded = other.get_digest("data")
                if snapshot.digest == digest and snapshot.recognize(recorded).digest == recorded:
                    other.record["data"]["digest"] = digest


def _check_same_data(runs: Sequence[_Run]) -> None:
    for run in runs[1:]:
        if run.get_digest("data") != runs[0].get_digest("data"):
            first, other = (f"{r.record['data']['name']} {r.record['data']['digest'][:12]}" for r in (runs[0], run))
            if run.digest_format != runs[0].digest_format:
                raise RunError(
                    f"{runs[0].folder} and {run.folder} have data digests of two formats ({first} and "
                    f"{other}), so the data cannot be compared without the data set: put it to the path in the record "
                    f"of the later "
                    "run, or compare with --allow_different_data"
                )
            resized = _describe_resizing(runs[0], run)
            remedy = f"; {resized}, so compare their validation accuracies" if resized else ""
            raise RunError(
                f"{runs[0].folder} and {run.folder} used different data ({first} and {other}){remedy}; a test needs "
                "the same test images, and --allow_different_data shows the results without one"
            )


def _describe_resizing(first: _Run, other: _Run) -> str:
    """Describe how the images of two runs were resized differently; "" where that was done alike."""
    places = (("image_size", "settings", DEFAULT_IMAGE_SIZE), ("fit", "execution", "squeeze"))  # of earlier versions
    options = []
    for name, part, default in places:
        values = [run.record[part].get(name, default) for run in (first, other)]
        options += [f"--{name} was {values[0]} and {values[1]}"] if values[0] != values[1] else []
    return " and ".join(options)


def _group_by_conditions(runs: Sequence[_Run]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for run in runs:
        if run.conditions not in groups:
            name = string.ascii_uppercase[len(groups)] if len(groups) < 26 else f"G{len(groups) + 1}"
            groups[run.conditions] = _Group(name, [])
        groups[run.conditions].runs.append(run)
    return list(groups.values())


def _find_differences(groups: Sequence[_Group]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the groups two by two, as far as there is a test for it; else say why not."""
    differences = []
    notes = [
        f"group {group.name} has a seed more than once; mean and spread count it once"
        for group in groups
        if len(group.distinct) < len(group.runs)
    ]
    if len(groups) == 1 and len(groups[0].runs) == 2:
        differences.append(_compare_two_runs(*groups[0].runs))
    if len(groups) > MAX_GROUPS:
        notes.append(f"{len(groups):,} groups are too many for pairwise comparison; name fewer to see which differ")
        return differences, notes
    for first, second in itertools.combinations(groups, 2):
        sizes = len(first.distinct), len(second.distinct)
        if first.runs[0].get_digest("data") != second.runs[0].get_digest("data"):
            notes.append(f"groups {first.name} and {second.name} have different test images, so no test compares them")
        elif min(sizes) > 1:
            test = compute_welch_test(first.get_figures("accuracy"), second.get_figures("accuracy"))
            differences.append({"first": first.name, "second": second.name, "test": "Welch", **test})
        elif sizes == (1, 1):
            differences.append(_compare_two_runs(first.runs[0], second.runs[0]))
        else:
            single = first.name if sizes[0] == 1 else second.name
            notes.append(
                f"group {single} has only one seed, so its spread is unknown; train it with more seeds to compare it"
            )
    _judge(differences)
    return differences, list(dict.fromkeys(notes))


def _compare_two_runs(first: _Run, second: _Run) -> dict[str, Any]:
    (first_right, labels), (second_right, same_labels) = first.answers, second.answers
    if not np.array_equal(labels, same_labels):
        raise RunError(f"the predictions of {first.folder} and {second.folder} are not for the same test images")
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    return {
        "first": first.name,
        "second": second.name,
        "test": "McNemar",
        "difference": (only_second - only_first) / len(labels),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": compute_mcnemar_test(only_first, only_second),
    }


def _judge(differences: Sequence[dict[str, Any]]) -> None:
    """Add the p-value corrected for the number of comparisons (Holm, 1979), and whether it says that they differ."""
    for difference in differences:
        difference |= {"corrected_p_value": None, "differ": None}
    judged = sorted((d for d in differences if d["p_value"] is not None), key=lambda difference: difference["p_value"])
    corrected = 0.0
    for rank, difference in enumerate(judged):
        corrected = max(corrected, min(1.0, (len(judged) - rank) * difference["p_value"]))
        difference |= {"corrected_p_value": corrected, "differ": corrected < 1 - CONFIDENCE}


def _find_differing_settings(groups: Sequence[_Group]) -> dict[str, dict[str, Any]]:
    settings = {group.name: group.runs[0].record["settings"] for group in groups}
    names = dict.fromkeys(name for values in settings.values() for name in values if name != "seed")
    table = {name: {group: values.get(name) for group, values in settings.items()} for name in names}
    return {name: values for name, values in table.items() if any(v != values[groups[0].name] for v in values.values())}


def _find_differing_identity(runs: Sequence[_Run]) -> dict[str, dict[str, str | None]]:
    parts = ("data", "pretrained", "code", "plugins", "environment", "machine")
    table = {part: {run.name: run.get_digest(part) for run in runs} for part in parts}
    return {part: digests for part, digests in table.items() if len(set(digests.values())) > 1}


def _average_class_accuracy(group: _Group) -> dict[str, float | None]:
    """The mean over the seeds, None for a class without images."""
    by_class = {
        name: [run.evaluation["per_class"][name]["accuracy"] for run in group.distinct]
        for name in group.runs[0].evaluation["per_class"]
    }
    return {name: None if None in values else float(np.mean(values)) for name, values in by_class.items()}
