"""The way of a password from the command line."""

from __future__ import annotations

import sys

import pytest

from image_classifier.cli.access import hide_password


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["python", "-m", "x", "--db_pass", "p", "--seed", "1"], ["python", "-m", "x", "--seed", "1"]),
        (["x", "--db_pass=p=q", "y"], ["x", "y"]),
        (["x", "--db_pass"], ["x"]),
        (["x", "--db_pass_file", "p"], ["x", "--db_pass_file", "p"]),
        (["x", "--db_pass", "--db_pass", "y"], ["x", "y"]),
        ([], []),
    ],
)
def test_the_password_and_its_option_are_left_out(words: list[str], kept: list[str]) -> None:
    assert hide_password(words) == kept


def test_the_words_of_this_process_are_not_touched() -> None:
    before = list(sys.orig_argv)
    assert hide_password(sys.orig_argv) == before == sys.orig_argv
