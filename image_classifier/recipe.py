"""The recipes: named settings that the package brings as YAML, and the rule by which a run gets one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from image_classifier.errors import SettingsError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE

RecipeName = Literal["default", "fast", "best", "quick", "small", "notebook"]

DEFAULT_RECIPE, *RECIPES = get_args(RecipeName)
"""The rule by which a run without --recipe gets one (`choose_recipe`), and the recipes."""

NUM_IMAGES_FOR_FAST = 10_000
"""Images to train on from which the rule takes `fast`; `small` is better below (`benchmarks/small_sets.py`)."""


def get_recipe_path(name: str) -> Path:
    """Find a packaged recipe.

    Raises:
        SettingsError: there is no recipe of this name.
    """
    if name not in RECIPES:
        raise SettingsError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return Path(str(resources.files("image_classifier") / "recipes" / f"{name}.yaml"))


def load_recipe(name: str, image_size: int | None = None) -> dict[str, Any]:
    """Load the settings of a packaged recipe by option name.

    Args:
        image_size: side in pixels of the data set's images, if another than the recipe's: its image_sizes grow with it.
    """
    settings: dict[str, Any] = yaml.safe_load(get_recipe_path(name).read_text(encoding="utf-8"))
    side = image_size or DEFAULT_IMAGE_SIZE
    settings["image_sizes"] = [size * side // DEFAULT_IMAGE_SIZE for size in settings["image_sizes"]]
    return settings


def freeze_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists of a file into the tuples that settings have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def choose_recipe(num_images: int) -> str:
    """Choose what the recipe `default` is for a number of images to train on."""
    return "fast" if num_images >= NUM_IMAGES_FOR_FAST else "small"


def load_default_recipe(num_images: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Load the settings that the recipe `default` gives for a number of images to train on, with what was given above.

    A batch that is larger than the set is cut to it, unless that batch was given.

    Returns:
        Training settings by name, and `recipe` and `recipe_reason` for the record.
    """
    name = choose_recipe(num_images)
    recipe = load_recipe(name, given.get("image_size"))
    side = "at least" if name == "fast" else "fewer than"
    reason = f"{num_images:,} images to train on are {side} {NUM_IMAGES_FOR_FAST:,}"
    if "batch_size" not in given and recipe["batch_size"] > num_images:
        reason += f"; its batch_size of {recipe['batch_size']} is cut to {num_images}"
        recipe["batch_size"] = num_images
    return {**freeze_lists(recipe), **given, "recipe": name, "recipe_reason": reason}


def check_batch_size(batch_size: int, num_images: int) -> None:
    """Check that there are enough images to train on for a batch.

    Raises:
        SettingsError: there are not; the message names a recipe that fits.
    """
    if batch_size > num_images:
        fitting = "--recipe small" if num_images >= load_recipe("small")["batch_size"] else "--recipe default"
        raise SettingsError(
            f"--batch_size takes at most the {num_images} images that are trained on, got: {batch_size}; "
            f"choose {fitting}, or --batch_size {num_images} or less"
        )
