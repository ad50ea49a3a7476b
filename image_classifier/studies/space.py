"""The search space of a sweep: trainer settings with ranges or choices, from a YAML file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from image_classifier.errors import SettingsError
from image_classifier.files import load_yaml
from image_classifier.settings import RunSettings, TrainingSettings

NOT_SEARCHED = {
    "seed": "it draws the images that are validated on, too; --refit trains the best settings with several seeds",
    "validation_fraction": "trials would be judged on unlike images",
    "views": "it changes the evaluation on the test set alone, which judges no trial",
    "digest_every": "it changes no weights",
    "instruction_set": "a process has one for all trials",
    "device": "a process has one for all trials",
}
"""Settings of the trainer that no sweep searches, and why."""

_KEYS = ("choices", "low", "high", "step", "log")
_DIGITS = 6
"""Significant digits of a number that is drawn: more would only make the last bits of another processor matter."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A setting with the values that it may take: `choices`, or from `low` to `high`.

    Attributes:
        step: distance of two values of a range; None for any number, of whole numbers 1.
        log: whether the logarithm is drawn evenly.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False

    def describe(self) -> dict[str, Any]:
        """Describe the parameter as its file does."""
        if self.choices:
            return {"choices": [list(value) if isinstance(value, tuple) else value for value in self.choices]}
        return {key: getattr(self, key) for key in ("low", "high", "step", "log")}

    @property
    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        if self.choices:
            return CategoricalDistribution([_label(value) for value in self.choices])
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def edges(self) -> tuple[Any, ...]:
        """The choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def round(self, drawn: Any) -> Any:
        """Round what was drawn to what is written, within the range."""
        if self.choices or isinstance(drawn, int):
            return drawn
        if self.step is not None:
            return float(f"{drawn:.12g}")
        return min(max(float(f"{drawn:.{_DIGITS}g}"), self.low), self.high)

    def get_value(self, label: Any) -> Any:
        """Get the value of the setting that Optuna knows by a label."""
        return next((value for value in self.choices if _label(value) == label), label)

    def count(self) -> int:
        """Count the values of a grid.

        Raises:
            SettingsError: they are not countable.
        """
        if self.choices:
            return len(self.choices)
        step = 1 if self.step is None and isinstance(self.distribution, IntDistribution) else self.step
        if step is None or self.log:
            raise SettingsError(
                f"--search grid takes choices, whole numbers, or a range with a step; {self.name} has a continuous "
                "range: give its choices, or --search random"
            )
        return int((_exact(self.high) - _exact(self.low)) / _exact(step)) + 1

    def get_label(self, index: int) -> Any:
        """Get the label of a grid's value."""
        if self.choices:
            return _label(self.choices[index])
        value = _exact(self.low) + index * _exact(self.step or 1)
        return int(value) if isinstance(self.distribution, IntDistribution) else float(value)


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep, by name."""

    parameters: tuple[Parameter, ...]

    def describe(self) -> dict[str, Any]:
        """Describe the space as its file does."""
        return {parameter.name: parameter.describe() for parameter in self.parameters}

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna draws from, by name."""
        return {parameter.name: parameter.distribution for parameter in self.parameters}

    def round(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Round what was drawn to what is written."""
        return {parameter.name: parameter.round(drawn[parameter.name]) for parameter in self.parameters}

    def get_values(self, labels: Mapping[str, Any]) -> dict[str, Any]:
        """Get the settings that Optuna knows by labels."""
        return {parameter.name: parameter.get_value(labels[parameter.name]) for parameter in self.parameters}

    def count(self) -> int:
        """Count the points of the grid.

        Raises:
            SettingsError: they are not countable.
        """
        return math.prod(parameter.count() for parameter in self.parameters)

    def get_point(self, number: int) -> dict[str, Any]:
        """Get a point of the grid, by labels; the last parameter varies first."""
        labels = {}
        for parameter in reversed(self.parameters):
            number, index = divmod(number, parameter.count())
            labels[parameter.name] = parameter.get_label(index)
        return dict(reversed(labels.items()))


def load_space(path: Path, parse: Callable[[str, Any], Any]) -> Space:
    """Load a space: ranges such as `learning_rate: {low: 0.02, high: 0.5, log: true}`, and choices such as
    `flip: {choices: [none, random]}`.

    Args:
        parse: checks a value of a setting as a config file's is, and gives it its type.

    Raises:
        SettingsError: it cannot be read, names something else than a setting that is searched, or a range is empty.
    """
    try:
        document = load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"--space: {path} cannot be read as YAML: {reason}; correct it") from error
    return build_space(path, document, parse)


def build_space(path: Path, document: Any, parse: Callable[[str, Any], Any]) -> Space:
    """Build a space out of what a file holds.

    Raises:
        SettingsError: it names something else than a setting that is searched, or a range is empty.
    """
    if not isinstance(document, dict) or not document:
        raise SettingsError(
            f"--space: {path} must contain settings with their values, such as `flip: {{choices: [none, random]}}`"
        )
    return Space(tuple(_build(path, name, document[name], parse) for name in sorted(document, key=str)))


def _build(path: Path, name: Any, described: Any, parse: Callable[[str, Any], Any]) -> Parameter:
    where = f"--space: {path}: {ascii(name)[1:-1][:50] if isinstance(name, str) else ascii(name)[:50]}"
    if name in NOT_SEARCHED:
        raise SettingsError(f"{where} cannot be searched: {NOT_SEARCHED[name]}; remove it")
    if isinstance(name, str) and name in TrainingSettings.__dataclass_fields__:
        parse_value = _name_place(where, lambda value: parse(name, value))
    else:
        if name not in RunSettings.__dataclass_fields__:
            parse(str(name), None)  # which says what may have been meant
        raise SettingsError(
            f"{where} is not a setting that influences the weights, so it cannot be searched; remove it"
        )
    keys = described.keys() if isinstance(described, dict) else ()
    unknown = [key for key in keys if key not in _KEYS]
    if "choices" in keys and len(keys) == 1:
        return Parameter(name=name, choices=_check_choices(where, described["choices"], parse_value))
    if not {"low", "high"} <= set(keys) or "choices" in keys or unknown:
        got = f", got: {ascii(unknown[0])[:50]}" if unknown else ""
        raise SettingsError(f"{where} takes {{choices: [...]}}, or {{low: .., high: ..}} with step or log{got}")
    return _build_range(where, name, described, parse_value)


def _name_place(where: str, parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse_value(value: Any) -> Any:
        try:
            return parse(value)
        except SettingsError as error:
            raise SettingsError(f"{where}: {str(error).rpartition(': --')[2]}") from error

    return parse_value


def _check_choices(where: str, choices: Any, parse_value: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(choices, list) or not choices:
        raise SettingsError(f"{where}: choices takes a list of values with one at least, got: {ascii(choices)[:50]}")
    values = tuple(parse_value(value) for value in choices)
    for first, second in itertools.combinations(values, 2):
        if first == second:
            raise SettingsError(f"{where}: choices has {_label(first)} twice; remove one")
    return values


def _build_range(where: str, name: str, described: dict[str, Any], parse_value: Callable[[Any], Any]) -> Parameter:
    low, high, log = parse_value(described["low"]), parse_value(described["high"]), described.get("log", False)
    step = None if described.get("step") is None else parse_value(described["step"])
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (low, high, step or 1)):
        raise SettingsError(f"{where} is not a number, so it has no range; give its choices: [...]")
    if name == "image_size":
        raise SettingsError(f"{where} takes only certain sizes, so it has no range; give its choices: [...]")
    if type(log) is not bool:
        raise SettingsError(f"{where}: log takes true or false, got: {ascii(log)[:50]}")
    if float(f"{low:.{_DIGITS}g}") >= float(f"{high:.{_DIGITS}g}"):
        raise SettingsError(
            f"{where}: the range from {low} to {high} is empty; low must be below high, within {_DIGITS} digits"
        )
    if log and (low <= 0 or step is not None):
        wrong = f"low: {low}" if step is None else f"step: {step}"
        raise SettingsError(f"{where}: log takes a low above 0 and no step, got: {wrong}")
    if step is not None and (step <= 0 or (_exact(high) - _exact(low)) % _exact(step) != 0):
        raise SettingsError(
            f"{where}: step takes a number above 0 that divides the range from {low} to {high}, got: {step}"
        )
    return Parameter(name=name, low=low, high=high, step=step, log=log)


def _exact(number: float) -> Decimal:
    return Decimal(str(number))


def _label(value: Any) -> Any:
    """What Optuna calls a value: it knows no lists."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
