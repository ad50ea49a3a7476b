"""The MLflow store: what it refuses."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_classifier import progress
from image_classifier.errors import RegistryError, SettingsError
from image_classifier.progress import shown
from image_classifier.references import check_tracking_uri
from image_classifier.tracking import store as stores
from image_classifier.tracking.store import EMBEDDED, Store, find_sqlite_file


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://name:word@localhost", "must not contain a password"),
        ("postgresql+psycopg://name:word@localhost/mlflow", "must not contain a password"),
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


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////srv/mlflow.db", Path("/srv/mlflow.db")),
        ("sqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite+pysqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:mlflow.db?uri=true", None),
        ("postgresql+psycopg://db/mlflow", None),
    ],
)
def test_the_file_of_a_store_is_found(uri: str, file: Path | None) -> None:
    assert find_sqlite_file(uri) == file


@pytest.mark.parametrize("name", ["it's an ü & more", "what?", "100 %", "#1 %20"])
def test_a_store_lies_in_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        with Store(None, tmp_path / name).open("list the models") as client:
            assert list(client.search_registered_models()) == []
    assert sorted(path.name for path in (tmp_path / name / EMBEDDED).iterdir()) == [".lock", "mlflow.db"]


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--tracking_uri is not a database URL"):
        Store("postgresql://:::", tmp_path)


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


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers, as one whose processes were stopped."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield listener.getsockname()[1]


def test_a_server_that_accepts_and_does_not_answer_is_told_and_given_up(
    silent_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(progress, "INTERVAL_S", 0.5)
    uri = f"http://127.0.0.1:{silent_server}"
    with shown("command"), pytest.raises(RegistryError, match="nothing answers there; check --tracking_uri") as caught:
        with Store(uri, tmp_path).open("list the models") as client:
            client.search_registered_models()
    assert "\n" not in str(caught.value)
    assert "MLflow: list the models: 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("answers", [True, False], ids=["accepts", "refuses"])
def test_a_database_that_does_not_answer_is_given_up_at_once(
    answers: bool, silent_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow alone tries ten times, for two minutes."""
    monkeypatch.setattr(stores, "_TIMEOUT_S", 2)
    port = silent_server if answers else 9
    started = time.monotonic()
    with pytest.raises(RegistryError, match="connection timeout expired|nothing answers there"):
        with Store(f"postgresql+psycopg://127.0.0.1:{port}/mlflow", tmp_path).open("list the models"):
            pass
    assert time.monotonic() - started < 60


def test_a_file_that_is_no_database_is_named_at_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / EMBEDDED / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(b"a text, and no database of SQLite" * 100)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="mlflow.db cannot be read as a SQLite database: file is not a database"):
        with Store(None, tmp_path).open("list the models"):
            pass
    assert time.monotonic() - started < 60
    assert path.read_bytes().startswith(b"a text")
