"""The trainer's options: where they come from, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from image_classifier.cli.train import build_settings, build_trainer_parser, main, parse_settings
from image_classifier.config import RunSettings, load_recipe, restore_training_settings

NAMES = ["--experiment_name", "e", "--run_name", "r"]


def parse(*options: str) -> RunSettings:
    return build_settings(parse_settings(build_trainer_parser(), [*NAMES, *options]))


def test_without_options_the_settings_are_those_of_the_first_recipe() -> None:
    training = restore_training_settings(load_recipe("fast"))
    assert parse() == RunSettings(experiment_name="e", run_name="r", training=training)


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


def test_the_printed_config_gives_the_same_settings_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe", "notebook", "--seed", "3", "--input_mean", "[0.1, 0.2, 0.3]", "--num_workers", "2"]
    assert main([*NAMES, *options, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["batch_size"] == 4
    (tmp_path / "printed.yaml").write_text(printed)
    assert parse("--config", str(tmp_path / "printed.yaml")) == parse(*options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat"]),
        (["--learning_rate", "fast"], ["--learning_rate", "float", "fast"]),
        (["--num_epochs", "1.5"], ["--num_epochs", "int", "1.5"]),
        (["--num_epochs"], ["--num_epochs", "expected one argument"]),
        (["--model", "alexnet"], ["--model", "lenet", "alexnet"]),
        (["--nesterov", "perhaps"], ["--nesterov", "bool", "perhaps"]),
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
        ("- 1\n- 2\n", ""),
        ("learning_rate: [\n", ""),
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
