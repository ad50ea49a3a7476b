"""A secret shows itself nowhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
from pathlib import Path

import pytest

from image_classifier.credentials import Secret, load_secret
from image_classifier.errors import SettingsError

TEXT = "correct horse"


@dataclasses.dataclass
class Holder:
    secret: Secret


def test_a_secret_is_revealed_by_that_name_alone(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(TEXT)
    logging.getLogger().warning("%s %r", secret, Holder(secret))
    shown = [str(secret), repr(secret), f"{secret}", "%s" % secret, repr([secret]), repr(Holder(secret)), caplog.text]
    assert all(TEXT not in text and "****" in text for text in shown)
    assert secret.reveal() == TEXT


def test_a_secret_is_written_nowhere() -> None:
    for write in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            write(Secret(TEXT))


def test_secrets_are_compared_and_copied() -> None:
    secret = Secret(TEXT)
    assert secret == Secret(TEXT) != Secret("another") and len({secret, Secret(TEXT)}) == 1
    assert secret != TEXT
    assert copy.deepcopy(secret) is secret and dataclasses.asdict(Holder(secret)) == {"secret": secret}


@pytest.mark.parametrize("content", ["correct horse", "correct horse\n", "correct horse\r\nanother line\n"])
def test_a_file_gives_its_first_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content.encode())
    assert load_secret(path, "db_pass_file").reveal() == TEXT


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b"", "is empty"), (b"\nx", "is empty"), (b"\xff", "it is no text")]
)
def test_a_file_without_a_secret_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"--db_pass_file: .*{words}"):
        load_secret(path, "db_pass_file")
