"""Words, variables and config files: what is taken, and that each refusal is one plain line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import OTHER_VARIABLES, get_options, get_variable, parse_arguments, parse_config
from image_classifier.cli.commands import iterate_parsers
from image_classifier.cli.train import build_settings, build_trainer_parser, complete_settings, parse_settings
from image_classifier.credentials import Secret
from image_classifier.errors import SettingsError
from image_classifier.recipe import load_default_recipe
from image_classifier.serving.settings import ServerSettings
from image_classifier.text import make_printable
from tests.conftest import PROGRAMS, REAL_DATA
from tests.repository import read_texts

PARSERS = {parser.prog: parser for parser in iterate_parsers()}
TRAINER = build_trainer_parser()

WRONG_VALUES = (
    *("", "x y", "1.5", "-1", "1e400", "nan", "null", "true", "[", "16,x", "[[1]]", "[null]", "{a: 1}", "&a [*a]"),
    *("!!python/name:os.system", "\x1b[31m\n", "x" * 5000, "[" * 5000, "9" * 5000),
)
PYTHON = re.compile(
    r"<class|\btyping\b|\btuple\b|NoneType|Literal|Traceback|\bNone\b|\bstr\b|\bint\b|\bfloat\b|\bbool\b|\bdict\b|"
    r"PosixPath|Namespace|NestedArg|Positive[IF]|Union|Parser key|Secret|jsonargparse"
)


@pytest.mark.parametrize("prog", PARSERS)
def test_help_says_what_an_option_takes_without_a_word_of_python(prog: str) -> None:
    text = " ".join(PARSERS[prog].format_help().partition("options:")[2].split())
    assert not PYTHON.search(text.replace("state_dict", "")) and not re.search(r"type:|null|: \)|default: False", text)


def test_help_names_numbers_lists_and_defaults() -> None:
    text = " ".join(TRAINER.format_help().split())
    assert "Number of passes over the training set; 0 only evaluates. (a whole number; default: 8)" in text
    assert "(whole numbers such as 16,24; default: 16,16,24,32,32,32,32,32)" in text
    assert "or refused. (default: squeeze)" in text


def find_refusal(parse: Callable[[], Any]) -> str | None:
    """Return the message of a refusal, which is one line without a word of Python; None if nothing is refused."""
    try:
        parse()
    except SettingsError as error:
        message = make_printable(str(error))  # as every command does
        assert not PYTHON.search(message), message
        return message
    return None


def get_required_words(parser: ArgumentParser) -> list[str]:
    """Get words that give what a command cannot do without."""
    words = []
    for action in parser._actions:
        if action.required and action.option_strings:
            words.append(f"--{action.dest}=x")
        elif not action.option_strings and action.nargs in (None, "+"):
            words.append("x")
    return words


@pytest.mark.parametrize("prog", PARSERS)
def test_every_option_refuses_what_it_does_not_take_in_one_plain_line(prog: str) -> None:
    parser = PARSERS[prog]
    required = get_required_words(parser)
    for name, action in get_options(parser).items():
        refusals = []
        for value in WRONG_VALUES:
            words = [*required, f"--{name}", *([] if action.nargs == 0 else [value])]

            def parse(words: list[str] = words) -> None:
                if prog == "image_classifier_trainer":
                    names = {"experiment_name": "e", "run_name": "r"}
                    values = complete_settings({**names, **parse_settings(parser, words), "resume": False})
                    build_settings(load_default_recipe(300, values))
                    return
                parsed = parse_arguments(parser, words)
                if prog.endswith("serve"):
                    ServerSettings(**{**parsed, "model": "m"})

            refusals.append(find_refusal(parse))
        typed = getattr(action, "_typehint", str)
        if typed not in (str, str | None, Secret | None) and action.nargs != 0:
            assert any(message and f"--{name}" in message for message in refusals), name
        assert find_refusal(lambda: parse_arguments(parser, [*required, f"--{name}"])) is None or action.nargs != 0
        assert find_refusal(lambda: parse_arguments(parser, [*required, f"--{name}.x", "1"]))


@pytest.mark.parametrize("prog", PARSERS)
def test_every_variable_refuses_what_it_does_not_take_by_its_own_name(
    prog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = PARSERS[prog]
    for name, action in get_options(parser).items():
        variable = get_variable(name)
        for value in WRONG_VALUES:
            monkeypatch.setenv(variable, value)
            message = find_refusal(lambda: parse_arguments(parser, get_required_words(parser)))
            assert message is None or variable in message or "brackets" in message, message
            if action.nargs == 0 and value != "true":
                assert message and f"{variable} takes true or false" in message
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("value", [*WRONG_VALUES, None, 1, 1.5, [], ["x"], [[1]], {}, {"a": 1}, True])
def test_every_line_of_a_config_file_refuses_what_it_does_not_take(value: Any) -> None:
    for name in get_options(TRAINER).keys() - {"config", "print_config", "resume"}:
        message = find_refusal(lambda: parse_config(TRAINER, {name: value}, Path("c.yaml"), refused=()))
        assert message is None or message.startswith(
            (f"--config: c.yaml: --{name} takes ", f"--config: c.yaml: {name} has")
        ), message


@pytest.mark.parametrize("content", [[1, 2], "text", 5, True, [[{}]]])
def test_a_config_file_that_holds_no_settings_is_refused(content: Any) -> None:
    message = find_refusal(lambda: parse_config(TRAINER, content, Path("c.yaml"), refused=()))
    assert message == "--config: c.yaml must hold lines such as `seed: 1`, a setting each"


@pytest.mark.parametrize("name", [1, True, "training", "seed.x", "", "é\n"])
def test_a_config_files_unknown_setting_is_refused(name: Any) -> None:
    message = find_refusal(lambda: parse_config(TRAINER, {name: {}}, Path("c.yaml"), refused=()))
    assert message is not None and "which is no setting" in message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--lr 0.1", "--learning_rate"),
        ("--learning-rate 0.1", "--learning_rate"),
        ("--learnin_rate=0.1", "--learning_rate"),
        ("--Learning_Rate 0.1", "--learning_rate"),
        ("--epochs 3", "--num_epochs"),
        ("--bs 64", "--batch_size"),
        ("--arch resnet", "--model"),
        ("--wd 0", "--weight_decay"),
        ("--workers 2", "--num_workers"),
        ("--data x", "--dataset_folder"),
        ("--output_dir x", "--experiments_folder"),
        ("--print-config", "--print_config"),
        ("--resum", "--resume"),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_the_one_that_may_be_meant(words: str, meant: str) -> None:
    option = re.split("[ =]", words)[0]
    message = find_refusal(lambda: parse_arguments(TRAINER, words.split()))
    assert message == f"{option} is no option (did you mean {meant}?); --help lists the options"


def test_each_unknown_option_is_named_once_and_what_follows_is_not_shown() -> None:
    message = find_refusal(lambda: parse_arguments(TRAINER, "--lr 1 --db_pas hunter2 --lr=2 --db_pas=hunter2".split()))
    assert message is not None and message.count("--lr") == 1 and "--db_pass?" in message and "hunter2" not in message


def test_what_stands_for_nothing_is_suggested_nothing() -> None:
    assert find_refusal(lambda: parse_arguments(TRAINER, ["--zzz"])) == "--zzz is no option; --help lists the options"
    message = find_refusal(lambda: parse_arguments(TRAINER, ["surplus"]))
    assert message == "unexpected argument: surplus; --help lists the options"


@pytest.mark.parametrize(
    ("words", "meant"),
    [("--schedule trianguler", "triangular"), ("--recipe notebok", "notebook"), ("--flip alternate", "alternating")],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_one_that_may_be_meant(words: str, meant: str) -> None:
    message = find_refusal(lambda: parse_arguments(TRAINER, words.split()))
    assert message is not None and message.endswith(f"got: {words.split()[1]} (did you mean {meant}?)")


@pytest.mark.parametrize("text", ["16,24", "[16,24]", "16, 24", " [16, 24]"])
def test_lists_are_written_with_commas_with_or_without_brackets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--image_sizes", text], [f"--image_sizes={text}"]):
        assert parse_arguments(TRAINER, words).image_sizes == (16, 24)
    assert parse_config(TRAINER, {"image_sizes": text}, Path("c"), refused=()) == {"image_sizes": (16, 24)}
    assert parse_config(TRAINER, {"image_sizes": [16, 24]}, Path("c"), refused=()) == {"image_sizes": (16, 24)}
    monkeypatch.setenv("IMAGE_CLASSIFIER_IMAGE_SIZES", text)
    assert parse_arguments(TRAINER, []).image_sizes == (16, 24)


def test_a_list_may_be_one_number_or_begin_with_a_minus() -> None:
    assert parse_arguments(TRAINER, ["--image_sizes", "32"]).image_sizes == (32,)
    assert parse_config(TRAINER, {"image_sizes": 32}, Path("c"), refused=()) == {"image_sizes": (32,)}
    assert parse_arguments(TRAINER, ["--input_mean", "-1,0,0.5"]).input_mean == (-1, 0, 0.5)
    message = find_refusal(lambda: parse_arguments(TRAINER, ["--image_sizes", "--seed", "1"]))
    assert message == "--image_sizes takes whole numbers such as 16,24, but nothing follows it"


@pytest.mark.parametrize("prog", [prog for prog in PARSERS if not prog.endswith(("upgrade", "list"))])
def test_an_empty_argument_is_refused_where_it_would_be_the_current_folder(prog: str) -> None:
    parser = PARSERS[prog]
    paths = [name for name, action in get_options(parser).items() if "Path" in str(getattr(action, "_typehint", ""))]
    for words in (*([f"--{name}", ""] for name in paths), *([f"--{name}="] for name in paths), [""]):
        message = find_refusal(lambda: parse_arguments(parser, [*get_required_words(parser), *words]))
        assert message in (
            f"{words[0].rstrip('=')} takes a path, got: ''",
            "an argument is empty; leave it out, or give what it should be",
        )


def test_a_variable_that_is_no_option_of_any_command_is_refused_in_every_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_LEARNIN_RATE", "1")
    for parser in PARSERS.values():
        message = find_refusal(lambda: parse_arguments(parser, get_required_words(parser)))
        assert message == (
            "IMAGE_CLASSIFIER_LEARNIN_RATE in the environment is no option of any command "
            "(did you mean IMAGE_CLASSIFIER_LEARNING_RATE?); unset it"
        )


@pytest.mark.parametrize(
    ("name", "meant"), [("LR", "LEARNING_RATE"), ("seed", "SEED"), ("CASHE", "CACHE"), ("BACH_SIZE", "BATCH_SIZE")]
)
def test_a_variable_that_is_unknown_is_refused_with_the_one_that_may_be_meant(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"IMAGE_CLASSIFIER_{name}", "1")
    message = find_refusal(lambda: parse_arguments(TRAINER, []))
    assert message is not None and f"(did you mean IMAGE_CLASSIFIER_{meant}?)" in message


def test_variables_of_other_commands_and_of_none_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*OTHER_VARIABLES, "IMAGE_CLASSIFIER_PORT", "IMAGE_CLASSIFIER_ALLOW_LOSS"):
        monkeypatch.setenv(variable, "not looked at")
    assert parse_arguments(TRAINER, ["--seed", "3"], defaults=False).as_dict() == {"seed": 3}


def test_every_variable_that_the_project_speaks_of_is_known() -> None:
    options = {get_variable(name) for parser in PARSERS.values() for name in get_options(parser)}
    spoken = {
        name
        for path, text in read_texts()
        if path.parts[0] != "tests"
        for name in re.findall(r"\bIMAGE_CLASSIFIER_[A-Z0-9_]*[A-Z0-9]\b", text)
    }
    assert spoken - options - {"IMAGE_CLASSIFIER_MODEL"} == spoken & OTHER_VARIABLES.keys()
    assert OTHER_VARIABLES.keys() >= {*REAL_DATA, *PROGRAMS}


def test_options_are_above_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_SEED", "1")
    monkeypatch.setenv("IMAGE_CLASSIFIER_PROFILE", "True")
    monkeypatch.setenv("IMAGE_CLASSIFIER_RESUME", "false")
    assert parse_arguments(TRAINER, [], defaults=False).as_dict() == {"seed": 1, "profile": True}
    assert parse_arguments(TRAINER, ["--seed", "2"]).seed == 2


def test_several_values_in_a_variable_are_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = PARSERS["image_classifier data snapshot"]
    monkeypatch.setenv("IMAGE_CLASSIFIER_WHERE", "class=cat,dog 'source=a b'")
    assert parse_arguments(parser, ["--dataset", "x"]).where == ["class=cat,dog", "source=a b"]


def test_help_comes_before_a_wrong_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_SEED", "x")
    with pytest.raises(SystemExit) as end:
        parse_arguments(TRAINER, ["--help"])
    assert end.value.code == 0 and "--learning_rate" in capsys.readouterr().out


def test_a_password_is_shown_by_no_refusal() -> None:
    for value in ("{a: hunter2}", "[hunter2]", "hunter2"):
        for words in (["--db_pass", value], [f"--db_pass={value}"], ["--db_pass", value, "--seed", "x"]):
            assert "hunter2" not in (find_refusal(lambda: parse_arguments(TRAINER, words)) or "")
    config = {"db_pass": {"a": "hunter2"}}
    assert "hunter2" not in (find_refusal(lambda: parse_config(TRAINER, config, Path("c"), refused=())) or "")
