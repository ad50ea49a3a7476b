"""A published folder: every change of a bit is found, and so is another's signature."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from image_classifier.errors import ModelError, SettingsError
from image_classifier.publishing.signing import build_signer
from image_classifier.serving.predictor import load_predictor
from image_classifier.serving.published import (
    MANIFEST,
    SIGNATURE,
    check_identity_signature,
    check_published,
    find_published,
)
from tests.sigstore import GITHUB_ISSUER, Sigstore

NUM_BITS = 12


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a private key, an RSA one without a curve, and its public key."""
    key = ec.generate_private_key(curve) if curve else rsa.generate_private_key(65537, 2048)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


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
    assert check_published(moved, keys[1])["run_name"] == "run"
    assert load_predictor(moved, public_key=keys[1]).model.run_name == "run"


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
                check_published(signed, None if name == MANIFEST else keys[1])
        (signed / name).write_bytes(content)
    check_published(signed, keys[1])


def test_a_file_that_is_missing_or_was_added_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "more.txt").write_text("more")
    with pytest.raises(ModelError, match="not signed by"):
        check_published(signed, keys[1])
    (signed / "more.txt").unlink()
    (signed / "parity.json").unlink()
    with pytest.raises(ModelError, match="parity.json cannot be read"):
        check_published(signed)


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
    with pytest.raises(SettingsError, match="no public key that can verify"):
        check_published(signed, path)


IDENTITY = "https://github.com/somebody/image-classifier/.github/workflows/training.yaml@refs/heads/main"


def test_a_workflow_signs_with_its_identity(signed: Path, tmp_path: Path) -> None:
    sigstore = Sigstore()
    config = sigstore.write_trust_config(tmp_path / "trust.json")
    sigstore.sign(signed, IDENTITY)
    check_identity_signature(signed, IDENTITY, GITHUB_ISSUER, config)
    (signed / "more.txt").write_text("more")
    with pytest.raises(ModelError, match=f"is not signed by {IDENTITY}"):
        check_identity_signature(signed, IDENTITY, GITHUB_ISSUER, config)


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
        check_identity_signature(signed, IDENTITY, GITHUB_ISSUER, sigstore.write_trust_config(tmp_path / "trust.json"))


def test_an_identity_that_another_sigstore_vouched_for_is_refused(signed: Path, tmp_path: Path) -> None:
    Sigstore().sign(signed, IDENTITY)
    with pytest.raises(ModelError, match="is not signed by"):
        check_identity_signature(signed, IDENTITY, GITHUB_ISSUER, Sigstore().write_trust_config(tmp_path / "trust"))
    (tmp_path / "noise").write_bytes(b"noise")
    for path in (tmp_path / "noise", tmp_path / "missing"):
        with pytest.raises(SettingsError, match=f"Sigstore's keys cannot be had from {path}"):
            check_identity_signature(signed, IDENTITY, GITHUB_ISSUER, path)


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
    with pytest.raises(ModelError, match="holds no published model"):
        find_published(trained_run)
