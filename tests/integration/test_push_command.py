"""`image_classifier push hub` against a server with the Hub's interface, by the Hub's own client."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_classifier.published.folder import read_published
from tests import forked
from tests.attestations import put
from tests.conftest import find_port
from tests.hub import TOKEN, Hub, serving_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories."""
    with serving_hub() as hub:
        yield hub


def push(*words: str | Path, endpoint: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Push as a user does who has given the token in the environment."""
    variables = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return forked.run("image_classifier", "push", "hub", *words, variables=variables, timeout_s=120)


def test_a_published_model_is_there_with_its_card(published_run: Path, hub: Hub, tmp_path: Path) -> None:
    result = push("me/cifar", published_run, "--private", endpoint=hub.url)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{hub.url}/me/cifar/commit/")
    files = dict(hub.repositories["me/cifar"])
    assert hub.private == {"me/cifar"}
    assert files.pop(".gitattributes") == b""
    assert files.pop("README.md") == files["MODEL_CARD.md"]
    assert files == {path.name: path.read_bytes() for path in published_run.iterdir()}
    (tmp_path / "pulled").mkdir()
    for name, content in files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    assert read_published(tmp_path / "pulled").manifest["run_name"]


def test_files_of_an_earlier_version_go_and_those_of_others_stay(published_run: Path, hub: Hub) -> None:
    hub.repositories["me/cifar"] = {"model.sig": b"of an earlier version", "NOTES.md": b"by hand"}
    assert push("me/cifar", published_run.parent, endpoint=hub.url).returncode == 0
    files = hub.repositories["me/cifar"]
    assert "model.sig" not in files and files["NOTES.md"] == b"by hand" and files["model.onnx"]
    manifest = json.loads(files["manifest.json"])
    assert hub.messages == [
        f"Publish {manifest['experiment_name']}/{manifest['run_name']}"
    ]  # and no path of this machine
    assert hub.private == set()


def test_verdicts_are_pushed_and_those_of_an_earlier_version_go(published_run: Path, hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(published_run, tmp_path / "published")
    path = put(folder, b"{}")
    hub.repositories["me/cifar"] = {"attestations/verdict-earlier.json": b"of an earlier version"}
    assert push("me/cifar", folder, endpoint=hub.url).returncode == 0
    files = hub.repositories["me/cifar"]
    assert {name for name in files if name.startswith("attestations/")} == {f"attestations/{path.name}"}


def test_what_cannot_be_pushed_is_one_line(published_run: Path, hub: Hub, tmp_path: Path) -> None:
    changed = shutil.copytree(published_run, tmp_path / "changed")
    (changed / "model.onnx").write_bytes(b"another")
    nowhere = f"http://127.0.0.1:{find_port()}"
    secret = "hf_" + "secret" * 6
    for words, endpoint, token, message in (
        (("me/cifar", changed), hub.url, TOKEN, "was changed after it was published"),
        (("me/cifar", tmp_path), hub.url, TOKEN, "has no published model"),
        (("no name!", published_run), hub.url, TOKEN, "cannot push to no name!"),
        (("me/cifar", published_run), hub.url, secret, "the token in HF_TOKEN"),
        (("me/cifar", published_run), nowhere, TOKEN, f"cannot push to me/cifar at {nowhere}"),
    ):
        result = push(*words, endpoint=endpoint, token=token)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
        assert result.stderr.count("error: ") == 1 and token not in result.stderr
    assert hub.repositories == {}
