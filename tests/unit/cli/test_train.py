"""The trainer's options: where they come from, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from image_classifier.choices import Fit, Log
from image_classifier.cli.arguments import get_variable
from image_classifier.cli.train import (
    build_settings,
    build_trainer_parser,
    complete_settings,
    format_settings,
    main,
    parse_settings,
    settle_recipe,
)
from image_classifier.errors import ImageClassifierError, SettingsError
from image_classifier.plugins import OWN
from image_classifier.recipe import DEFAULT_RECIPE, RECIPES, load_default_recipe, load_recipe
from image_classifier.settings import FLAGS, RunSettings, TrainingSettings
from tests.bombs import build_laughs
from tests.tiny import write_tiny_dataset

NOT_PRINTED = {"training", "recipe_reason", "settings_from_weights", "resume", "db_password", "ask_db_password"}
NAMES = ["--experiment_name", "e", "--run_name", "r"]
PARSER = build_trainer_parser()


def parse(*options: str) -> RunSettings:
    return build_settings(complete_settings(parse_settings(PARSER, [*NAMES, *options])))


def test_without_a_recipe_the_settings_that_it_decides_stay_open_until_the_data_is_known() -> None:
    values = complete_settings(parse_settings(PARSER, [*NAMES, "--learning_rate", "0.5"]))
    assert values == {"experiment_name": "e", "run_name": "r", "learning_rate": 0.5, "recipe": "default"}
    training = TrainingSettings.from_recipe("fast")
    assert parse("--recipe", "fast") == RunSettings(experiment_name="e", run_name="r", recipe="fast", training=training)


def test_the_default_recipes_open_settings_are_comments_of_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = print_settings(capsys, *NAMES, "--learning_rate", "0.5")
    values = yaml.safe_load(printed)
    assert (values["recipe"], values["learning_rate"], values["seed"]) == ("default", 0.5, 0)
    assert load_recipe("fast").keys() & values.keys() == {"learning_rate"}
    comments = [line for line in printed.splitlines() if line.startswith("# ")]
    for comment, recipe, side in zip(comments, ("fast", "small"), ("from", "below"), strict=True):
        words, _, shown = comment.partition(f": {recipe}, that is ")
        assert words == f"# {side} 10,000 images to train on"
        assert yaml.safe_load(shown) == {k: v for k, v in load_recipe(recipe).items() if k != "learning_rate"}


def test_options_are_above_the_environment_above_the_config_file_above_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("batch_size: 5\nnum_epochs: 6\nlearning_rate: 0.25\n")
    monkeypatch.setenv("IMAGE_CLASSIFIER_NUM_EPOCHS", "7")
    monkeypatch.setenv("IMAGE_CLASSIFIER_LEARNING_RATE", "0.5")
    settings = parse("--learning_rate", "0.75", "--config", str(config), "--recipe", "notebook").training
    assert (settings.learning_rate, settings.num_epochs, settings.batch_size) == (0.75, 7, 5)
    assert (settings.model, settings.momentum) == ("lenet", 0.9)


def test_recipe_and_config_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("seed: 9\n")
    monkeypatch.setenv("IMAGE_CLASSIFIER_RECIPE", "notebook")
    monkeypatch.setenv("IMAGE_CLASSIFIER_CONFIG", str(tmp_path / "c.yaml"))
    settings = parse()
    assert settings.training.model == "lenet" and settings.training.seed == 9


def print_settings(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Print the settings that options give, as a config file."""
    assert main([*options, "--print_config"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_the_printed_settings_are_all_settings_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    printed = yaml.safe_load(print_settings(capsys, *NAMES, "--recipe", "notebook"))
    fields = RunSettings.__dataclass_fields__.keys() | TrainingSettings.__dataclass_fields__.keys()
    assert printed.keys() == fields - NOT_PRINTED
    assert (printed["batch_size"], printed["recipe"], printed["image_sizes"]) == (4, "notebook", [32])


def test_settings_are_printed_without_names_which_can_be_given_beside_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(print_settings(capsys, "--recipe", "quick", "--seed", "3"))
    assert parse("--config", str(config)) == parse("--recipe", "quick", "--seed", "3")
    assert main(["--config", str(config)]) == 2
    assert capsys.readouterr().err == "error: --experiment_name is required: a name for a folder\n"


def test_options_and_environment_are_above_a_printed_config_and_the_recipe_below_is_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(print_settings(capsys, *NAMES, "--recipe", "notebook", "--seed", "3"))
    monkeypatch.setenv("IMAGE_CLASSIFIER_NUM_EPOCHS", "7")
    assert parse("--config", str(config), "--seed", "4") == parse("--recipe", "notebook", "--seed", "4")
    config.write_text("recipe: notebook\nseed: 3\n")
    settings = parse("--config", str(config))
    assert (settings.recipe, settings.training.batch_size, settings.training.seed) == ("notebook", 4, 3)
    assert parse("--config", str(config), "--recipe", "quick").training.model == "airbench_small"


def test_settings_at_odds_are_refused_instead_of_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NAMES, "--recipe", "fast", "--model", "lenet", "--print_config"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: --model lenet has no normalisation")


@pytest.mark.parametrize("options", [["--schedule", "constant"], ["--momentum", "0.1"], ["--optimizer", "muon"]])
def test_an_option_beside_what_is_left_open_is_printed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, value = options[0].removeprefix("--"), options[1]
    assert f"\n{name}: {value}\n" in print_settings(capsys, *NAMES, *options)


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    assert "hunter2" not in print_settings(capsys, *NAMES, "--db_pass", "hunter2", "--database", "shapes")
    monkeypatch.setenv("IMAGE_CLASSIFIER_DB_PASS", "hunter2")
    assert "hunter2" not in print_settings(capsys, *NAMES, "--database", "shapes")
    assert main([*NAMES, "--print_config", "--tracking_uri", "http://me:hunter2@localhost"]) == 2
    output = capsys.readouterr()
    assert "hunter2" not in output.out + output.err


@pytest.mark.parametrize("name", ["config", "print_config", "resume", "help", "version"])
def test_a_config_file_holds_nothing_that_is_for_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"seed: 3\n{name}: true\n")
    for options in ([], ["--print_config"]):
        assert main([*NAMES, "--config", str(tmp_path / "c.yaml"), *options]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"holds {name}, which only the command line may set" in message


def draw(kind: str) -> st.SearchStrategy[Any]:
    """Draw values of one of the trainer's options, most of them good ones."""
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    tricky = st.sampled_from(
        ["null", "true", "1", "1e3", "[a]", "{a: b}", "- a", "a: b", "#", "~", "'", '"', "é ", "=", "*a"]
    )
    small, fraction = st.integers(0, 40), st.floats(0, 0.9375, allow_subnormal=False)
    name = (text | tricky).filter(lambda name: _is_name(name))
    whole = ("num_workers", "keep_checkpoints", "num_epochs", "translate", "cutout", "num_threads", "shards")
    drawn: dict[str, st.SearchStrategy[Any]] = {
        **{option: small for option in whole},
        **{option: name for option in ("experiment_name", "run_name")},
        **{option: text | tricky for option in ("experiments_folder", "db_config", "db_pass_file")},
        **{option: text | tricky | st.just("s3://bucket/a b") for option in ("dataset_folder", "mirror")},
        "model": st.sampled_from(OWN["model"]),
        "optimizer": st.sampled_from([*OWN["optimizer"], "my_package.optim:build"]),
        "nesterov": st.booleans(),
        **{option: fraction for option in ("momentum", "warmup_fraction", "label_smoothing", "validation_fraction")},
        **{option: fraction for option in ("color_jitter", "ema_decay", "mixup", "cutmix")},
        **{option: st.integers(0, 6) for option in ("rand_augment", "early_stopping", "shuffle_window")},
        "pretrained_model": text | tricky,
        "database": st.sampled_from(["shapes", "a.b-c@12"]),
        "checkpoint_every": st.sampled_from(["2epochs", "500steps"]),
        "tracking_uri": st.sampled_from(["sqlite:///runs.db", "https://somewhere:1/a"]),
        "batch_size": st.integers(1, 2000),
        "digest_every": st.integers(1, 2000),
        "seed": st.integers(0, 2**63 - 1),
        "image_sizes": st.lists(st.sampled_from([16, 24, 32, 64]), min_size=1, max_size=5),
        **{option: st.floats(1e-12, 1e6) for option in ("learning_rate", "body_learning_rate")},
        "weight_decay": st.floats(0, 10),
        "input_mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "input_std": st.lists(st.floats(1e-3, 1), min_size=3, max_size=3),
    }
    hint = {**get_type_hints(TrainingSettings), "fit": Fit, "log": Log}.get(kind)
    return st.sampled_from(get_args(hint)) if get_origin(hint) is Literal else drawn[kind]


def build(given: dict[str, Any]) -> RunSettings:
    """Build the settings that are given, for 300 images to train on."""
    values = complete_settings(given)
    return build_settings(load_default_recipe(300, values) if values["recipe"] == DEFAULT_RECIPE else values)


def _is_name(name: str) -> bool:
    try:
        return bool(RunSettings(experiment_name=name, run_name="r"))
    except SettingsError:
        return False


OPTIONS = sorted(
    (RunSettings.__dataclass_fields__.keys() | TrainingSettings.__dataclass_fields__.keys())
    - {"recipe", *NOT_PRINTED, *FLAGS}
)


@settings(deadline=None)
@given(
    st.sampled_from([DEFAULT_RECIPE, *RECIPES]),
    st.sets(st.sampled_from(OPTIONS), max_size=12).flatmap(
        lambda chosen: st.fixed_dictionaries({option: draw(option) for option in sorted(chosen)})
    ),
    st.sets(st.sampled_from(sorted(FLAGS.keys() - {"resume"})), max_size=2),
    st.booleans(),
)
def test_printed_settings_give_the_same_settings_and_the_same_print_again(
    recipe: str, values: dict[str, Any], flags: set[str], in_environment: bool
) -> None:
    words = {name: ",".join(map(repr, v)) if isinstance(v, list) else str(v) for name, v in values.items()}
    options = [] if in_environment else [f"--{name}={text}" for name, text in words.items()]
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        for name, text in words.items() if in_environment else ():
            patch.setenv(get_variable(name), text)
        names = [word for word in ("--experiment_name=e", "--run_name=r") if word[2:].partition("=")[0] not in values]
        try:
            given = parse_settings(PARSER, [f"--recipe={recipe}", *names, *options, *(f"--{flag}" for flag in flags)])
            expected = build(given)
        except SettingsError:
            reject()
        for name in words if in_environment else ():
            patch.delenv(get_variable(name))
        printed = format_settings(complete_settings(given))
        assert printed.isascii()
        config = Path(folder, "config.yaml")
        config.write_text(printed, encoding="ascii")
        again = parse_settings(PARSER, ["--config", str(config)])
        assert build(again) == expected
        assert format_settings(complete_settings(again)) == printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat"]),
        (["--learning_rate", "fast"], ["--learning_rate takes a number, got: fast"]),
        (["--num_epochs", "1.5"], ["--num_epochs takes a whole number, got: 1.5"]),
        (["--num_epochs"], ["--num_epochs takes a whole number, but nothing follows it"]),
        (["--model", "alexnet"], ["--model", "lenet", "alexnet"]),
        (["--nesterov", "perhaps"], ["--nesterov takes true or false, got: perhaps"]),
        (["--batch_size", "0"], ["--batch_size", "1 or more", "0"]),
        (["--recipe", "secret"], ["--recipe", "notebook", "secret"]),
        (["--config", "no/such.yaml"], ["--config", "no/such.yaml"]),
        (["--experiment_name", "../x"], ["--experiment_name", "../x"]),
        (["--run_name", ""], ["--run_name"]),
        (["surplus"], ["surplus"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_and_nothing_is_written(
    options: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*NAMES, *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("learning_rat: 1\n", "learning_rat"),
        ("learning_rate: fast\n", "fast"),
        ("- 1\n- 2\n", "must hold lines such as"),
        ("learning_rate: [\n", "cannot be read"),
        ("seed: 1\nlr: 2\n", "holds lr, which is no setting (did you mean learning_rate?)"),
        ("learning-rate: 2\n", "(did you mean learning_rate?)"),
        ("seed: null\n", "--seed takes a whole number, got: null"),
        ("run_name: 2026\n", "--run_name takes text, got: 2026"),
        ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested deeper than the 32 levels"),
        (build_laughs(), "the alias *a0; aliases are not supported"),
        ("seed: 1\nseed: 2\n", "the key 'seed' twice"),
        ("seed: !!int ''\n", "cannot be read as YAML"),
        ("image_sizes: '[&a 16, *a]'\n", "--image_sizes"),
        ("seed: 1" + ":1" * 30_000, "out of range"),
        ("# " + "x" * 2**16, "more than the 65,536 bytes"),
    ],
)
def test_a_wrong_config_file_is_refused_in_one_line(
    content: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(content)
    assert main([*NAMES, "--config", str(tmp_path / "c.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and word in message


def test_required_names_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "error: --experiment_name is required: a name for a folder\n"


def test_a_run_whose_recipe_is_left_open_may_exist_when_torchrun_starts_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "e" / "run"
    run.mkdir(parents=True)
    dataset = write_tiny_dataset(tmp_path / "data")
    values = {"recipe": "default", "experiments_folder": tmp_path, "experiment_name": "e", "run_name": "run"}
    with pytest.raises(ImageClassifierError, match="exists already"):
        settle_recipe({**values, "dataset_folder": dataset})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_settings, snapshot = settle_recipe({**values, "dataset_folder": dataset})
    assert run_settings.recipe == "small" and snapshot is not None
