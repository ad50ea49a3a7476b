"""Settings: complete, checked when made, and the recipes that give them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.access import Reading
from image_classifier.credentials import Secret
from image_classifier.errors import SettingsError
from image_classifier.image_sizes import IMAGE_SIZES, ImageSize, scale_batch
from image_classifier.recipe import RECIPES, load_default_recipe, load_recipe
from image_classifier.references import Reference, get_published_weights, get_reference, parse_reference
from image_classifier.settings import (
    ADDITIONS,
    RunSettings,
    TrainingSettings,
    restore_training_settings,
    update_recorded_settings,
)
from tests.tiny import make_training


def make_run_settings(**values: Any) -> RunSettings:
    return RunSettings(**{"experiment_name": "e", "run_name": "r", **values})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("num_epochs", -1),
        ("batch_size", 0),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-9),
        ("weight_decay", float("nan")),
        ("warmup_fraction", 1.0),
        ("label_smoothing", 1.0),
        ("translate", 17),
        ("cutout", -1),
        ("input_mean", (0.5, 0.5, 1.5)),
        ("input_std", (0.5, 0.0, 0.5)),
        ("validation_fraction", 1.0),
        ("color_jitter", 1.1),
        ("color_jitter", float("nan")),
        ("rand_augment", 31),
        ("mixup", -0.1),
        ("mixup", float("nan")),
        ("cutmix", 101.0),
        ("sampler", "random"),
        ("class_weights", "inverse"),
        ("ema_decay", 1.0),
        ("shuffle_window", -1),
        ("shuffle_window", 2**20 + 1),
        ("early_stopping", -1),
        ("early_stopping", 7),
        ("seed", -1),
        ("seed", 2**63),
        ("shards", -1),
        ("digest_every", 0),
        ("model", "vgg16"),
        ("device", "tpu"),
        ("precision", "fp64"),
        ("flip", "always"),
        ("optimizer", "adam"),
        ("image_sizes", ()),
        ("image_sizes", (15, 32)),
        ("image_sizes", (32, 225)),
        ("image_size", 48),
        ("image_size", 64.0),
    ],
)
def test_a_training_setting_out_of_range_is_refused_by_name_and_value(option: str, value: Any) -> None:
    with pytest.raises(SettingsError) as error:
        make_training(**{option: value})
    message = str(error.value)
    got = ",".join(map(str, value)) if isinstance(value, tuple) else value
    assert message.startswith(f"--{option} takes ") and message.endswith(f", got: {got}") and "\n" not in message


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="--nesterov needs a --momentum"):
        make_training(momentum=0.0)
    unfit: list[dict[str, Any]] = [{"optimizer": "muon"}, {"image_sizes": (16, 32)}]
    for values in unfit:
        with pytest.raises(SettingsError, match="--model lenet .* as --recipe notebook has them for --image_size 32"):
            make_training(model="lenet", **values)
    with pytest.raises(SettingsError, match="--optimizer muon .* with --model resnet choose --optimizer sgd"):
        make_training(model="resnet", optimizer="muon")
    with pytest.raises(SettingsError, match="--optimizer muon .* set --nesterov true, or --optimizer sgd"):
        make_training(model="airbench", optimizer="muon", nesterov=False)
    with pytest.raises(SettingsError, match="--schedule constant has none; set --warmup_fraction 0"):
        make_training(schedule="constant")
    with pytest.raises(SettingsError, match="--mixup and --cutmix cannot be combined; set one of them to 0"):
        make_training(mixup=0.2, cutmix=1.0)
    for option in ("mixup", "cutmix"):
        with pytest.raises(SettingsError, match=f"--{option} mixes the images of a batch; set --batch_size 2 or more"):
            make_training(batch_size=1, **{option: 1.0})
    with pytest.raises(SettingsError, match="--class_weights balanced and --sampler balanced .* twice; choose one"):
        make_training(class_weights="balanced", sampler="balanced")
    with pytest.raises(SettingsError, match="--shuffle_window reads blocks .*, which --sampler balanced does not; set"):
        make_training(shuffle_window=512, sampler="balanced")
    with pytest.raises(SettingsError, match="--early_stopping takes a whole number from 0 to 3, for a run of 5 epochs"):
        make_training(early_stopping=4, num_epochs=5)


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_the_sides_that_steps_scale_to_grow_with_the_images_unless_they_are_given(image_size: ImageSize) -> None:
    for name in RECIPES:
        ours, own = load_recipe(name)["image_sizes"], load_recipe(name, image_size)
        assert [side * 32 for side in own["image_sizes"]] == [side * image_size for side in ours]
        assert own == {**load_recipe(name), "image_sizes": own["image_sizes"]}
        if name != "notebook":
            settings = TrainingSettings.from_recipe(name, image_size=image_size)
            assert (settings.image_size, list(settings.image_sizes)) == (image_size, own["image_sizes"])
    small = load_recipe("small", image_size)["image_sizes"]
    assert load_default_recipe(300, {"image_size": image_size})["image_sizes"] == tuple(small)
    assert load_default_recipe(300, {"image_size": image_size, "image_sizes": (20,)})["image_sizes"] == (20,)
    assert TrainingSettings.from_recipe("small", image_size=image_size, image_sizes=(24,)).image_sizes == (24,)


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_limits_in_pixels_follow_the_size_of_the_images(image_size: ImageSize) -> None:
    make_training(image_size=image_size, translate=image_size // 2, cutout=image_size)
    for option, limit in (("translate", image_size // 2), ("cutout", image_size)):
        with pytest.raises(SettingsError, match=f"--{option} takes a whole number from 0 to {limit}, got: {limit + 1}"):
            make_training(image_size=image_size, **{option: limit + 1})


def test_lenet_takes_larger_images_at_32_pixels_alone() -> None:
    assert make_training(model="lenet", image_size=64, image_sizes=(32,)).image_sizes == (32,)
    with pytest.raises(SettingsError, match="--model lenet .* --image_sizes 32"):
        TrainingSettings.from_recipe("notebook", image_size=64)


def test_a_reading_takes_sizes_that_there_are() -> None:
    assert [Reading().side, Reading(image_size=64).side] == [32, 64]
    for size in (33, 64.0, "64", True):
        with pytest.raises(SettingsError, match=f"--image_size takes one of 32, 64, 96, 128, 224, got: {size}"):
            Reading(image_size=size)  # type: ignore[arg-type]  # as a record may have it


def test_a_batch_takes_no_more_memory_for_larger_images() -> None:
    assert [scale_batch(500, side) for side in (16, 32, 64, 96, 128, 224)] == [500, 500, 500, 222, 125, 40]
    assert scale_batch(1, 224) == 1


def test_a_record_from_before_a_setting_means_what_runs_did_then() -> None:
    recorded = dataclasses.asdict(make_training())
    del recorded["image_sizes"], recorded["optimizer"]
    for name in ADDITIONS:
        del recorded[name]
    assert update_recorded_settings(recorded).items() >= ADDITIONS.items()
    restored = restore_training_settings(recorded)
    assert (restored.image_size, restored.image_sizes, restored.optimizer) == (32, (32,), "sgd")


def test_settings_that_nothing_names_are_those_of_the_recipe_fast() -> None:
    assert TrainingSettings() == TrainingSettings.from_recipe("fast")


def test_a_record_with_settings_that_are_gone_is_read() -> None:
    recorded = dataclasses.asdict(make_training(shards=1)) | {"num_threads": 2, "deterministic": True}
    del recorded["shards"]
    assert restore_training_settings(recorded) == make_training(shards=1)
    with pytest.raises(SettingsError, match="--deterministic false is of versions before 0.2; use the version that"):
        restore_training_settings(recorded | {"deterministic": False})


def test_a_record_of_settings_that_had_no_effect_means_those_without_them() -> None:
    recorded = dataclasses.asdict(make_training()) | {"schedule": "constant"}
    assert restore_training_settings(recorded) == make_training(schedule="constant", warmup_fraction=0)
    muon = make_training(model="airbench", optimizer="muon")
    recorded = dataclasses.asdict(muon) | {"nesterov": False}
    assert restore_training_settings(recorded) == muon


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "/x", "a/b", "a\\b", "a\nb", "a\0b", "a\x85b", ".x", " x", "x ", "x" * 101, "🐈" * 64, "\ud800"],
)
@pytest.mark.parametrize("option", ["experiment_name", "run_name"])
def test_a_name_that_is_no_plain_folder_name_is_refused(option: str, name: str) -> None:
    with pytest.raises(SettingsError) as error:
        make_run_settings(**{option: name})
    assert str(error.value).startswith(f"--{option} ") and "\n" not in str(error.value)


@given(st.text())
def test_whatever_name_is_taken_stays_inside_the_experiments_folder(name: str) -> None:
    try:
        settings = make_run_settings(run_name=name)
    except SettingsError:
        return
    assert settings.run_folder.parent == Path("experiments/e")
    assert settings.run_folder.name == name


@pytest.mark.parametrize(
    "value", ["", "1", "epochs", "0steps", "-1steps", "1.5epochs", "1epoch", " 1epochs", "1epochs\n"]
)
def test_a_checkpoint_interval_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="--checkpoint_every"):
        make_run_settings(checkpoint_every=value)


def test_a_checkpoint_interval_counts_epochs_or_steps() -> None:
    assert make_run_settings(checkpoint_every="2epochs").compute_checkpoint_steps(100) == 200
    assert make_run_settings(checkpoint_every="7steps").compute_checkpoint_steps(100) == 7


def test_a_pretrained_model_is_looked_for_under_the_experiments_folder_first(tmp_path: Path) -> None:
    settings = make_run_settings(experiments_folder=tmp_path, pretrained_model=Path("e/r/model.pth"))
    assert settings.pretrained_path == Path("e/r/model.pth")
    (tmp_path / "e/r").mkdir(parents=True)
    (tmp_path / "e/r/model.pth").touch()
    assert settings.pretrained_path == tmp_path / "e/r/model.pth"


def test_settings_come_back_from_their_record_and_unknown_ones_are_refused() -> None:
    settings = make_training(seed=7, input_mean=(0.1, 0.2, 0.3))
    recorded = {**dataclasses.asdict(settings), "input_mean": [0.1, 0.2, 0.3]}
    assert restore_training_settings(recorded) == settings
    with pytest.raises(SettingsError, match="warp_factor"):
        restore_training_settings({**recorded, "warp_factor": 9})


@pytest.mark.parametrize(
    "changes, shown", [({"model": "\u2028"}, r"got: '\\u2028'"), ({"warp\u0085": 9}, r"another version: 'warp\\x85'")]
)
def test_what_a_record_says_is_shown_in_one_line(changes: dict[str, Any], shown: str) -> None:
    with pytest.raises(SettingsError, match=shown) as caught:
        restore_training_settings({**load_recipe("notebook"), **changes})
    assert str(caught.value).isprintable()


def test_a_data_set_in_a_database_is_a_name_with_or_without_a_version() -> None:
    assert parse_reference("cifar10") == Reference("cifar10") and str(Reference("cifar10")) == "cifar10"
    assert parse_reference("a.b-c_1@12") == Reference("a.b-c_1", 12) and str(Reference("a", 12)) == "a@12"
    assert get_reference(Path("db:birds@3")) == Reference("birds", 3) and get_reference(Path("data/birds")) is None


@pytest.mark.parametrize("text", ["", "a b", "a/b", "a@", "a@0", "a@x", "@1", "a@1@2", "-a", "a\n", "a" * 101])
def test_another_form_of_a_data_set_in_a_database_is_refused(text: str) -> None:
    for make in (lambda: make_run_settings(database=text), lambda: get_reference(f"db:{text}")):
        with pytest.raises(SettingsError, match="is NAME or NAME@VERSION"):
            make()


def test_db_and_a_name_may_stand_for_the_dataset_folder() -> None:
    settings = make_run_settings(dataset_folder=Path("db:birds@3"))
    assert (settings.database, settings.dataset) == ("birds@3", Path("db:birds@3"))
    assert settings == make_run_settings(database="birds@3")
    assert make_run_settings(dataset_folder=Path("data/birds")).dataset == Path("data/birds")


def test_the_password_is_read_only_for_a_database_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "from the environment")
    (tmp_path / "password").write_text("from a file\n")
    missing = make_run_settings(db_pass_file=tmp_path / "missing")
    assert missing.database_access.password is None
    with pytest.raises(SettingsError, match="--db_pass_file: .*missing cannot be read"):
        dataclasses.replace(missing, database="birds").database_access
    for values, expected in (
        ({}, "from the environment"),
        ({"db_pass_file": tmp_path / "password"}, "from a file"),
        ({"db_password": Secret("given")}, "given"),
    ):
        settings = make_run_settings(database="birds", **values)
        assert settings.database_access.password == Secret(expected)
        assert expected not in f"{settings} {settings.database_access}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "muon", "freeze": "body", "batch_size": 80}, "--freeze body takes --optimizer sgd.*_rate 40,"),
        ({"optimizer": "muon", "body_learning_rate": 0.1}, "--body_learning_rate takes --optimizer sgd"),
        ({"freeze": "body", "body_learning_rate": 0.1}, "--body_learning_rate is of a body that is trained"),
        ({"body_learning_rate": 0.0}, "--body_learning_rate takes a number above 0, got: 0.0"),
        ({"freeze": "head"}, "--freeze takes one of none, body, got: head"),
    ],
)
def test_rates_of_the_body_that_have_no_effect_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_training(model="airbench", **values)


def test_a_record_of_before_froze_nothing() -> None:
    recorded = update_recorded_settings({"optimizer": "sgd", "image_sizes": [32], "shards": 1})
    assert (recorded["freeze"], recorded["body_learning_rate"]) == ("none", None)


@pytest.mark.parametrize("text", ["torchvision:", "torchvision:resnet18", "torchvision:a@b@c", "torchvision:../x@y"])
def test_published_weights_are_named_by_network_and_weights(text: str) -> None:
    assert get_published_weights("torchvision:resnet18@IMAGENET1K_V1") == ("resnet18", "IMAGENET1K_V1")
    assert get_published_weights("a/torchvision:x") is None
    with pytest.raises(SettingsError, match="torchvision:NETWORK@WEIGHTS such as torchvision:resnet18@IMAGENET1K_V1"):
        make_run_settings(pretrained_model=Path(text))
