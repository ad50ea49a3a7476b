from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from image_classifier.cli.sweep import parse_value
from image_classifier.cli.train import build_trainer_parser
from image_classifier.errors import SettingsError
from image_classifier.studies.space import Space, load_space

PARSER = build_trainer_parser()


def load(folder: Path, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return load_space(path, partial(parse_value, PARSER, path))


def test_a_space_has_values_of_the_settings_types(tmp_path: Path) -> None:
    space = load(
        tmp_path,
        "translate: {low: 0, high: 4}\nlearning_rate: {low: 1e-3, high: 1, log: true}\n"
        "image_sizes: {choices: ['16,32', [32]]}\nbody_learning_rate: {choices: [null, 0.5]}\n"
        "momentum: {low: 0, high: 0.9, step: 0.3}\nnesterov: {choices: [true, false]}\n",
    )
    assert space.describe() == {
        "body_learning_rate": {"choices": [None, 0.5]},
        "image_sizes": {"choices": [[16, 32], [32]]},
        "learning_rate": {"low": 0.001, "high": 1.0, "step": None, "log": True},
        "momentum": {"low": 0.0, "high": 0.9, "step": 0.3, "log": False},
        "nesterov": {"choices": [True, False]},
        "translate": {"low": 0, "high": 4, "step": None, "log": False},
    }
    labels = {"image_sizes": "16,32", "body_learning_rate": None, "learning_rate": 0.1, "momentum": 0.3}
    labels |= {"nesterov": False, "translate": 3}
    assert space.get_values(labels) == {**labels, "image_sizes": (16, 32)}


def test_the_order_of_a_file_does_not_matter(tmp_path: Path) -> None:
    lines = ["translate: {low: 0, high: 4}", "flip: {choices: [none, random]}"]
    assert load(tmp_path, "\n".join(lines)) == load(tmp_path, "\n".join(reversed(lines)))


def test_a_grid_has_each_point_once(tmp_path: Path) -> None:
    text = "translate: {low: 0, high: 4, step: 2}\nmomentum: {low: 0.1, high: 0.3, step: 0.1}\n"
    space = load(tmp_path, text + "flip: {choices: [none, random]}\n")
    points = [space.get_point(number) for number in range(space.count())]
    expected = [(f, m, t) for f in ("none", "random") for m in (0.1, 0.2, 0.3) for t in (0, 2, 4)]
    assert [(p["flip"], p["momentum"], p["translate"]) for p in points] == expected


def test_a_grid_of_any_size_is_counted_and_of_any_number_refused(tmp_path: Path) -> None:
    assert load(tmp_path, "num_epochs: {low: 1, high: 1000000000000}").count() == 10**12
    for text in ("momentum: {low: 0, high: 0.9}", "learning_rate: {low: 0.1, high: 1, log: true}"):
        with pytest.raises(SettingsError, match="--search grid takes choices, whole numbers, or a range with a step"):
            load(tmp_path, text).count()


def test_what_is_drawn_is_rounded_within_the_range(tmp_path: Path) -> None:
    space = load(tmp_path, "learning_rate: {low: 0.1234567, high: 0.5}\nmomentum: {low: 0, high: 0.9, step: 0.3}")
    assert space.round({"learning_rate": 0.123456789, "momentum": 0.3 * 3}) == {
        "learning_rate": 0.123457,
        "momentum": 0.9,
    }
    assert space.round({"learning_rate": 0.1234567, "momentum": 0.0})["learning_rate"] >= 0.1234567


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("", "must contain settings with their values"),
        ("- flip", "must contain settings with their values"),
        ("flip: {choices: [none, random]", "cannot be read as YAML"),
        ("learning_rat: {low: 0.1, high: 1}", "holds learning_rat, which is no setting (did you mean learning_rate?)"),
        ("seed: {low: 0, high: 9}", "seed cannot be searched: it draws the images that are validated on, too"),
        ("validation_fraction: {choices: [0.1, 0.2]}", "cannot be searched: trials would be judged on unlike images"),
        ("dataset_folder: {choices: [a, b]}", "is not a setting that influences the weights"),
        ("run_name: {choices: [a, b]}", "is not a setting that influences the weights"),
        ("1: {choices: [a, b]}", "holds 1, which is no setting"),
        ("flip: [none, random]", "flip takes {choices: [...]}, or {low: .., high: ..} with step or log"),
        ("flip: {choices: []}", "choices takes a list of values with one at least, got: []"),
        ("flip: {choices: [none, sideways]}", "flip takes one of none, random, alternating, got: sideways"),
        ("flip: {choices: [none, none]}", "choices has none twice"),
        ("flip: {low: none, high: random}", "is not a number, so it has no range"),
        ("flip: {choices: [none], low: 1}", "flip takes {choices: [...]}"),
        ("nesterov: {low: false, high: true}", "is not a number, so it has no range"),
        ("image_size: {low: 32, high: 64}", "takes only certain sizes, so it has no range"),
        ("learning_rate: {low: 0.1}", "takes {choices: [...]}, or {low: .., high: ..}"),
        ("learning_rate: {low: 0.1, high: 1, lgo: true}", "got: 'lgo'"),
        ("learning_rate: {low: 0.5, high: 0.1}", "the range from 0.5 to 0.1 is empty"),
        ("learning_rate: {low: 0.1, high: 0.1}", "the range from 0.1 to 0.1 is empty"),
        ("learning_rate: {low: 0.1, high: 0.10000001}", "is empty; low must be below high, within 6 digits"),
        ("learning_rate: {low: 0.1, high: .inf}", "is not a number"),
        ("learning_rate: {low: .nan, high: 1}", "is not a number"),
        ("learning_rate: {low: 0, high: 1, log: true}", "log takes a low above 0 and no step, got: low: 0"),
        ("learning_rate: {low: 0.1, high: 1, log: 1}", "log takes true or false, got: 1"),
        (
            "learning_rate: {low: 0.1, high: 1, step: 0.2}",
            "step takes a number above 0 that divides the range from 0.1 to 1.0",
        ),
        ("translate: {low: 0, high: 4, step: 0}", "step takes a number above 0"),
        ("translate: {low: 0.5, high: 4}", "translate takes a whole number, got: 0.5"),
        ("translate: {low: 0, high: 4, step: 0.5}", "translate takes a whole number, got: 0.5"),
        ("learning_rate: {choices: [fast]}", "learning_rate takes a number, got: fast"),
        ("learning_rate: {choices: [null]}", "learning_rate takes a number, got: null"),
    ],
)
def test_a_bad_space_is_refused_in_one_line(tmp_path: Path, text: str, refusal: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith("--space: ") and refusal in message and "\n" not in message


def test_a_space_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--space: .*none.yaml cannot be read as YAML: No such file"):
        load_space(tmp_path / "none.yaml", lambda name, value: value)
