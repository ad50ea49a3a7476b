"""What all commands have in common: exit statuses, one line an error, no trace unless it is a defect."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from image_classifier.__main__ import main
from image_classifier.cli.command import execute
from image_classifier.cli.commands import COMMANDS
from image_classifier.errors import DataError


def test_an_expected_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise DataError("no data; get some")

    assert execute(fail) == 2
    assert capsys.readouterr().err == "error: no data; get some\n"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\udcff"])
def test_an_expected_error_is_one_line_whatever_it_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise DataError(f"no data in {name}; get some")

    assert execute(fail) == 2
    said = capsys.readouterr().err
    assert said == f"error: no data in {ascii(name)[1:-1]}; get some\n"


def test_a_defect_keeps_its_trace() -> None:
    def fail(argv: Sequence[str] | None) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(fail)


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {name} " in listing for name in COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian' is no command" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_importing_torch(command: str) -> None:
    script = (
        "import sys; from image_classifier.__main__ import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules, 'matplotlib' in sys.modules, 'pyarrow' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("usage: image_classifier") and answer.endswith("False False False\n")


def test_the_log_level_is_for_this_package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_LOG_LEVEL", "debug")
    assert execute(lambda argv: 0) == 0
    assert logging.getLogger("image_classifier.data.snapshot").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


def test_an_unknown_log_level_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_LOG_LEVEL", "loud\n")
    assert execute(lambda argv: 0) == 2
    assert capsys.readouterr().err == (
        "error: IMAGE_CLASSIFIER_LOG_LEVEL takes one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got: 'loud\\n'\n"
    )


def test_sigterm_ends_any_command_with_143_and_is_given_back() -> None:
    def wait(argv: Sequence[str] | None) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        execute(wait)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
