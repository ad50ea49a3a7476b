"""The MLflow store: what it refuses."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from image_classifier.config import check_tracking_uri
from image_classifier.errors import RegistryError, SettingsError
from image_classifier.tracking.store import EMBEDDED, Store


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://name:word@localhost", "must not hold a password"),
        ("postgresql+psycopg://name:word@localhost/mlflow", "must not hold a password"),
        ("localhost:5000", "takes http://"),
        ("ftp://localhost", "takes http://"),
        ("http://[", "is no address"),
    ],
)
def test_a_bad_address_is_refused_and_a_password_not_shown(uri: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        check_tracking_uri(uri)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://localhost:5000", "sqlite:////srv/mlflow.db", "postgresql+psycopg://db/mlflow"])
def test_an_address_of_a_store_is_taken(uri: str) -> None:
    check_tracking_uri(uri)


def test_a_server_that_does_not_answer_is_one_line_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # bound and not listening: connections are refused
        start = time.monotonic()
        with pytest.raises(RegistryError, match="nothing answers there") as caught:
            store = Store(f"http://127.0.0.1:{port}", tmp_path)
            with store.open("list the models") as client:
                client.search_registered_models()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20
    assert not (tmp_path / EMBEDDED).exists()
