"""A published folder: every change of a bit is found, and so is another's signature."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.errors import ModelError, SettingsError
from image_classifier.published import folder as published
from image_classifier.published.folder import (
    MANIFEST,
    MODEL,
    SIGNATURE,
    check_identity_signature,
    describe_content,
    find_published,
    read_manifest,
    read_published,
    serialize_manifest,
)
from image_classifier.published.predictor import load_predictor
from image_classifier.publishing.signing import build_signer
from image_classifier.storage import write_folder_atomically
from tests.published import write_keys
from tests.sigstore import GITHUB_ISSUER, Sigstore

NUM_BITS = 12


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key."""
    return write_keys(tmp_path_factory.mktemp("keys"), "key", ec.SECP256R1())


@pytest.fixture
def signed(published_run: Path, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the published folder, signed."""
    folder = shutil.copytree(published_run, tmp_path / "signed")
    build_signer(str(keys[0]))(folder)
    return folder


def test_a_signed_folder_is_accepted_also_under_another_name(signed: Path, keys: tuple[Path, Path]) -> None:
    moved = signed.rename(signed.with_name("moved"))
    assert read_published(moved, keys[1]).manifest["run_name"] == "run"
    assert load_predictor(moved, public_key=keys[1]).model.run_name == "run"


def swap(one: Path, other: Path) -> None:
    """Exchange two folders in one step, as `mv --exchange` does."""
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = (os.fsencode(one), os.fsencode(other))
    if ctypes.CDLL(None, use_errno=True).renameat2(current_folder, names[0], current_folder, names[1], exchange):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_folders_that_are_swapped_meanwhile_load_nothing_that_is_not_signed(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    version = load_predictor(signed, public_key=keys[1]).model.version
    other = shutil.copytree(signed, tmp_path / "other")
    content = onnx.load(other / MODEL)
    content.doc_string = "another"
    (other / MODEL).write_bytes(content.SerializeToString())
    manifest = read_manifest(other)
    manifest["files"][MODEL] = describe_content((other / MODEL).read_bytes())
    (other / MANIFEST).write_bytes(serialize_manifest(manifest))
    assert load_predictor(other).model.version != version
    is_over = threading.Event()

    def swap_on() -> None:
        while not is_over.is_set():
            swap(signed, other)

    swapping = threading.Thread(target=swap_on)
    swapping.start()
    try:
        loaded = 0
        for _ in range(60):
            with suppress(ModelError):
                assert load_predictor(signed, public_key=keys[1]).model.version == version
                loaded += 1
    finally:
        is_over.set()
        swapping.join()
    assert loaded  # at times it is the signed one all the while


def test_every_file_changed_by_one_bit_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    chance = random.Random(0)
    names = sorted(path.name for path in signed.iterdir())
    assert {MANIFEST, SIGNATURE, "model.onnx", "parity.json", "MODEL_CARD.md", "sbom.cdx.json"} <= set(names)
    for name in names:
        content = (signed / name).read_bytes()
        for position in (0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(NUM_BITS))):
            changed = bytearray(content)
            changed[position] ^= 1 << chance.randrange(8)
            (signed / name).write_bytes(changed)
            with pytest.raises(ModelError):
                read_published(signed, None if name == MANIFEST else keys[1])
        (signed / name).write_bytes(content)
    read_published(signed, keys[1])


def test_a_file_that_is_missing_or_was_added_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    for name in ("more.txt", ".hidden", "-n", "new\nline"):
        (signed / name).write_text("more")
        for public_key in (keys[1], None):
            with pytest.raises(ModelError, match=r"^.* has '[^\n]*', which its manifest.json does not list[^\n]*$"):
                load_predictor(signed, public_key=public_key)
        (signed / name).unlink()
    (signed / "folder").mkdir()
    with pytest.raises(ModelError, match="has 'folder', which its manifest"):
        read_published(signed)
    (signed / "folder").rmdir()
    (signed / "parity.json").unlink()
    with pytest.raises(ModelError, match="parity.json cannot be read"):
        read_published(signed)


@pytest.mark.parametrize(
    "name, facts",
    [
        ("../record.json", {}),
        ("/etc/hostname", {}),
        ("a/b", {}),
        ("..", {}),
        (".", {}),
        ("", {}),
        ("a\0b", {}),
        ("new\nline", {}),
        (MANIFEST, {}),
        (SIGNATURE, {}),
        ("parity.json", {"size": "1"}),
        ("parity.json", {"size": 1.0}),
        ("parity.json", {"more": 1}),
    ],
)
def test_a_manifest_names_files_of_its_folder_alone(
    name: str, facts: dict[str, Any], published_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(published_run, tmp_path / "published")
    manifest = read_manifest(folder)
    manifest["files"][name] = manifest["files"]["parity.json"] | facts
    (folder / MANIFEST).write_bytes(serialize_manifest(manifest))
    with pytest.raises(ModelError, match="is not a file name with size and sha256"):
        read_published(folder)


def test_no_more_is_read_of_a_file_than_a_model_may_have(published_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published_run, tmp_path / "published")
    os.truncate(folder / "model.onnx", 2**40)
    for path in (folder, folder / "model.onnx"):
        with pytest.raises(ModelError, match="model.onnx cannot be read: .* more than the 1,073,741,824 bytes"):
            load_predictor(path)


def test_another_key_and_no_signature_are_refused(signed: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    _, other = write_keys(tmp_path, "other", ec.SECP256R1())
    with pytest.raises(ModelError, match="is not signed by"):
        load_predictor(signed, public_key=other)
    (signed / SIGNATURE).unlink()
    with pytest.raises(ModelError, match="is not signed: it has no model.sig"):
        load_predictor(signed, public_key=keys[1])


@pytest.mark.parametrize("kind", ["rsa", "private", "missing", "noise"])
def test_a_key_of_the_wrong_kind_is_refused(kind: str, signed: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    path = {"rsa": lambda: write_keys(tmp_path, "rsa")[1], "private": lambda: keys[0]}.get(
        kind, lambda: tmp_path / kind
    )()
    if kind == "noise":
        path.write_bytes(b"noise")
    with pytest.raises(SettingsError, match="is not a usable public key"):
        read_published(signed, path)


IDENTITY = "https://github.com/somebody/image-classifier/.github/workflows/training.yaml@refs/heads/main"


def test_a_workflow_signs_with_its_identity(signed: Path, tmp_path: Path) -> None:
    sigstore = Sigstore()
    config = sigstore.write_trust_config(tmp_path / "trust.json")
    sigstore.sign(signed, IDENTITY)
    check_identity_signature(signed, read_published(signed), IDENTITY, GITHUB_ISSUER, config)
    (signed / "more.txt").write_text("more")
    with pytest.raises(ModelError, match="'more.txt', which its manifest.json does not list"):
        read_published(signed)


@pytest.mark.parametrize(
    ("identity", "issuer"),
    [
        (IDENTITY.replace("main", "other"), GITHUB_ISSUER),
        (IDENTITY.replace("heads", "tags"), GITHUB_ISSUER),
        (IDENTITY.replace("somebody", "somebody-else"), GITHUB_ISSUER),
        (IDENTITY.replace("training", "ci"), GITHUB_ISSUER),
        (IDENTITY, "https://accounts.test"),
    ],
)
def test_another_identity_is_refused(signed: Path, tmp_path: Path, identity: str, issuer: str) -> None:
    sigstore = Sigstore()
    sigstore.sign(signed, identity, issuer=issuer)
    with pytest.raises(ModelError, match="is not signed by"):
        check_identity_signature(
            signed,
            read_published(signed),
            IDENTITY,
            GITHUB_ISSUER,
            sigstore.write_trust_config(tmp_path / "trust.json"),
        )


def test_an_identity_that_another_sigstore_vouched_for_is_refused(signed: Path, tmp_path: Path) -> None:
    Sigstore().sign(signed, IDENTITY)
    with pytest.raises(ModelError, match="is not signed by"):
        check_identity_signature(
            signed, read_published(signed), IDENTITY, GITHUB_ISSUER, Sigstore().write_trust_config(tmp_path / "trust")
        )
    (tmp_path / "noise").write_bytes(b"noise")
    for path in (tmp_path / "noise", tmp_path / "missing"):
        with pytest.raises(SettingsError, match=f"Sigstore's keys cannot be loaded from {path}"):
            check_identity_signature(signed, read_published(signed), IDENTITY, GITHUB_ISSUER, path)


BAD_KEYS: dict[str, Callable[[Path], Path]] = {
    "rsa": lambda folder: write_keys(folder, "rsa")[0],
    "public": lambda folder: write_keys(folder, "key", ec.SECP256R1())[1],
    "curve": lambda folder: write_keys(folder, "key", ec.SECP256K1())[0],
    "missing": lambda folder: folder / "missing",
}


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_a_key_that_cannot_sign_is_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--sign_key"):
        build_signer(str(BAD_KEYS[kind](tmp_path)))


def test_a_run_that_was_not_published_has_no_published_model(trained_run: Path, published_run: Path) -> None:
    assert find_published(published_run.parent) == find_published(published_run) == published_run
    with pytest.raises(ModelError, match="has no published model"):
        find_published(trained_run)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing", "folder"])
@pytest.mark.parametrize("name", ["model.onnx", MANIFEST])
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, name: str, signed: Path) -> None:
    (signed / name).unlink()
    if kind == "pipe":
        os.mkfifo(signed / name)
    elif kind == "folder":
        (signed / name).mkdir()
    else:
        (signed / name).symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(ModelError, match="cannot be read|it has no manifest.json"):
        read_published(signed)


@pytest.mark.parametrize("files", [[], ["model.onnx"], None, 3, "model.onnx"])
def test_a_manifest_whose_files_are_none_is_refused(files: object, signed: Path) -> None:
    manifest = json.loads((signed / MANIFEST).read_text()) | {"files": files}
    (signed / MANIFEST).write_bytes(serialize_manifest(manifest))
    with pytest.raises(ModelError, match="was changed or is damaged"):
        read_published(signed)


def test_a_folder_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(
    signed: Path, keys: tuple[Path, Path], published_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one comes between two files, and once between the files and the signature."""
    read_bytes, num_calls = published._read_bytes, 0
    contents = {path.name: path.read_bytes() for path in signed.iterdir()}
    manifest = json.loads(contents[MANIFEST]) | {"package_version": "another"}
    others = {**contents, MANIFEST: serialize_manifest(manifest)}
    write_folder_atomically(signed.parent / "other", {name: others[name] for name in others if name != SIGNATURE})
    build_signer(str(keys[0]))(signed.parent / "other")
    others = {path.name: path.read_bytes() for path in (signed.parent / "other").iterdir()}

    for replace_at in range(1, len(contents) + 1):
        write_folder_atomically(signed, contents, replace=True)
        num_calls = 0

        def read(path: Path) -> bytes:
            nonlocal num_calls
            num_calls += 1
            if num_calls == replace_at:
                write_folder_atomically(signed, others, replace=True)
            return read_bytes(path)

        monkeypatch.setattr(published, "_read_bytes", read)
        found = read_published(signed, keys[1])
        assert found.files in (contents, others)


def test_the_signature_is_checked_of_what_was_read(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write to the folder puts the signed files there while the signature is checked, and others before."""
    contents = {path.name: path.read_bytes() for path in signed.iterdir()}
    manifest = json.loads(contents[MANIFEST])
    manifest["files"]["MODEL_CARD.md"] = describe_content(b"better")
    forged = {**contents, "MODEL_CARD.md": b"better", MANIFEST: serialize_manifest(manifest)}
    write_folder_atomically(signed, forged, replace=True)
    check = published.check_signature

    def swap(*words: Any) -> None:
        write_folder_atomically(signed, contents, replace=True)
        try:
            check(*words)
        finally:
            write_folder_atomically(signed, forged, replace=True)

    monkeypatch.setattr(published, "check_signature", swap)
    with pytest.raises(ModelError, match="not signed by"):
        read_published(signed, keys[1])


def test_a_signature_that_cannot_be_checked_for_want_of_room_says_so(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(ModelError, match="cannot be copied: temporary files cannot be created .* TMPDIR"):
        read_published(signed, keys[1])
