"""Recipes: complete, and chosen by the number of images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import SettingsError
from image_classifier.recipe import (
    DEFAULT_RECIPE,
    NUM_IMAGES_FOR_FAST,
    RECIPES,
    choose_recipe,
    freeze_lists,
    get_recipe_path,
    load_default_recipe,
    load_recipe,
)
from image_classifier.settings import ADDITIONS, TrainingSettings


def test_the_default_recipe_is_small_for_small_sets_and_fast_for_others() -> None:
    for num_images, name, words in (
        (NUM_IMAGES_FOR_FAST, "fast", "10,000 images to train on are at least 10,000"),
        (NUM_IMAGES_FOR_FAST - 1, "small", "9,999 images to train on are fewer than 10,000"),
    ):
        values = load_default_recipe(num_images, {"seed": 3})
        assert choose_recipe(num_images) == values["recipe"] == name and values["recipe_reason"] == words
        assert values == {**freeze_lists(load_recipe(name)), "seed": 3, "recipe": name, "recipe_reason": words}


@given(st.integers(1, 60_000))
def test_the_default_recipe_has_no_batch_larger_than_the_set_and_says_so(num_images: int) -> None:
    values = load_default_recipe(num_images, {})
    batch_size = load_recipe(values["recipe"])["batch_size"]
    assert values["batch_size"] == min(batch_size, num_images)
    is_cut = f"its batch_size of {batch_size} is cut to {num_images}" in values["recipe_reason"]
    assert is_cut == (num_images < batch_size)
    assert load_default_recipe(num_images, {"batch_size": 70_000})["batch_size"] == 70_000


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_all_that_decides_its_result(name: str) -> None:
    left_open = {"validation_fraction", "keep", "seed", "device", "engine", "instruction_set", *ADDITIONS}
    assert load_recipe(name).keys() | left_open == TrainingSettings.__dataclass_fields__.keys()
    assert TrainingSettings.from_recipe(name)


def test_an_unknown_recipe_is_refused() -> None:
    for name in ("../secret", DEFAULT_RECIPE):
        with pytest.raises(
            SettingsError, match=f"there is no recipe '{name}'; the recipes are fast, best, quick, small"
        ):
            get_recipe_path(name)
