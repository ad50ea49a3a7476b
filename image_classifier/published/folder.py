"""The folder of a published model: its layout, its manifest and its signature.

::

    model.onnx        uint8 [N, S, S, 3] RGB in, float32 [N, C] probabilities out; metadata describes the model
    model.int8.onnx   the same, quantized, if that paid off
    parity.json       differences between its predictions and the run's
    drift_reference.json  statistics of the test set (`reference.py`); earlier versions wrote none
    MODEL_CARD.md     the model card, also for Hugging Face
    samples.png       test images side by side, if asked for
    sbom.cdx.json     software bill of materials (CycloneDX)
    manifest.json     size and sha256 of each of these files, written last
    model.sig         optional signature of all of them (a Sigstore bundle by OpenSSF's model-signing)
    attestations/     signed verdicts about the run (`attestation.py`); not covered by the signature
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier import files
from image_classifier.errors import ModelError, SettingsError, StorageError
from image_classifier.extras import load_extra
from image_classifier.storage import scratch_folder
from image_classifier.text import one_line

FORMAT_VERSION = 1
MAX_BYTES = 2**30
"""Size limit of each file."""
MODEL = "model.onnx"
INT8_MODEL = "model.int8.onnx"
PARITY = "parity.json"
REFERENCE = "drift_reference.json"
CARD = "MODEL_CARD.md"
SAMPLES = "samples.png"
SBOM = "sbom.cdx.json"
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
PUBLISHED = "published"
"""Subfolder of a run."""
RUN_RECORD = "run.json"
"""File that marks a folder as a run."""
ATTESTATIONS = "attestations"
"""Subfolder with signed verdicts. The manifest does not list them, because more may be added."""

_NUM_TRIES = 20  # for a folder that is replaced while it is read

_NEEDS = ("experiment_name", "run_name", "data_digest", "classes", "files", "digest")


def is_published(path: Path) -> bool:
    """Return whether a path is a published model: its folder, or an ONNX file."""
    return path.suffix == ".onnx" or (path / MODEL).is_file()


def find_published(path: Path) -> Path:
    """Return the folder of a published model: the path itself, or its subfolder if the path is a run.

    Raises:
        ModelError: there is none.
    """
    for folder in (path, path / PUBLISHED):
        if (folder / MANIFEST).is_file() and (folder / MODEL).is_file():
            return folder
    raise ModelError(f"{path} has no published model; create one with: image_classifier publish RUN")


def serialize_manifest(content: dict[str, Any]) -> bytes:
    """Serialize a manifest in its canonical form, with the digest of its content."""
    content = {key: value for key, value in content.items() if key != "digest"}
    line = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(line.encode()).hexdigest()
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def describe_content(content: bytes) -> dict[str, Any]:
    """Build a file's entry in the manifest."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class Published:
    """A consistent copy of a published model in memory.

    Attributes:
        files: content by name: the files that the manifest lists, the manifest, and the signature if there is one.
    """

    manifest: dict[str, Any]
    files: dict[str, bytes]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a published model.

    Raises:
        ModelError: it is missing, changed, or has a later format.
    """
    if (folder / RUN_RECORD).is_file():
        place = f"use {folder / PUBLISHED}" if (folder / PUBLISHED).is_dir() else "publish it first"
        raise ModelError(f"{folder} is a run, not a published model: {place}")
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"{folder} is not a published model: it has no {MANIFEST}; create one with: publish RUN")
    return _parse_manifest(_read_bytes(folder / MANIFEST), folder / MANIFEST)


def _parse_manifest(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = files.parse_json(raw)
        version = int(manifest["format_version"])
        if version > FORMAT_VERSION:
            raise ModelError(
                f"{path} has the format {version}; this version reads up to {FORMAT_VERSION}: install a later one"
            )
        if any(key not in manifest for key in _NEEDS) or serialize_manifest(manifest) != raw:
            raise ValueError("its content does not match its digest")
        for name, facts in manifest["files"].items():
            if not _is_described(name, facts):
                raise ValueError(f"{name!a} is not a file name with size and sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} was changed or is damaged: {error}; publish the run again") from error
    return manifest


def _is_described(name: str, facts: dict[str, Any]) -> bool:
    """Return whether an entry has size and sha256, and the name of a file directly in the folder."""
    is_name = name.isprintable() and "/" not in name and name not in ("", ".", "..", MANIFEST, SIGNATURE, ATTESTATIONS)
    return is_name and facts.keys() == {"size", "sha256"} and type(facts["size"]) is int


def read_file(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Read a file of a published model and check it against the manifest.

    Raises:
        ModelError: it cannot be read, or differs from the manifest.
    """
    content = _read_bytes(folder / name)
    if describe_content(content) != manifest["files"].get(name):
        raise ModelError(
            f"{folder / name} was changed after it was published: it does not match {MANIFEST}; publish the run again"
        )
    return content


def _read_bytes(path: Path) -> bytes:
    try:
        return files.read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}; publish the run again") from error


def read_published(folder: Path, public_key: Path | None = None) -> Published:
    """Read a whole published model; check the files against the manifest, and the signature.

    If the folder is replaced meanwhile, it is read again, so that the result is entirely old or entirely new.

    Args:
        public_key: PEM file of the signer's elliptic-curve key; None skips the signature.

    Raises:
        ModelError: a file is missing, changed or not listed, or the signature is missing or does not match.
        SettingsError: the key cannot be read, or has another type.
    """
    for number in range(1, _NUM_TRIES + 1):
        manifest = read_manifest(folder)
        try:
            contents = {MANIFEST: serialize_manifest(manifest)}
            contents |= {name: read_file(folder, name, manifest) for name in manifest["files"]}
            if os.path.lexists(folder / SIGNATURE):
                contents[SIGNATURE] = _read_bytes(folder / SIGNATURE)
            if unknown := sorted(set(os.listdir(folder)) - {SIGNATURE, ATTESTATIONS, *contents}):
                reason = f"has {unknown[0]!a}, which its {MANIFEST} does not list"
                raise ModelError(f"{folder} {reason}; remove it, or publish the run again")
            published = Published(manifest, contents)
            if public_key is not None:
                check_signature(folder, published, public_key)
            return published
        except ModelError:
            if number == _NUM_TRIES or read_manifest(folder) == manifest:
                raise
            time.sleep(0.02)
    raise AssertionError


def check_signature(folder: Path, published: Published, public_key: Path) -> None:
    """Check that the owner of a key signed a published model.

    Raises:
        ModelError: the signature is missing, or does not match the key or a file.
        SettingsError: the key cannot be read or has another type, or model-signing is not installed.
    """
    with_signing = load_extra("model_signing.verifying", "publish")
    try:
        verifier = with_signing.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SettingsError(f"{public_key} is not a usable public key: {one_line(error)}") from error
    _verify(folder, published, verifier, public_key)


def check_identity_signature(
    folder: Path, published: Published, identity: str, issuer: str, trust_config: Path | None = None
) -> None:
    """Check that a Sigstore identity signed a published model.

    Args:
        identity: such as a workflow's URL: https://github.com/OWNER/REPOSITORY/.github/workflows/FILE@REF.
        issuer: of the identity's tokens, such as https://token.actions.githubusercontent.com.
        trust_config: file with the keys of a private Sigstore instance; None downloads those of the public one.

    Raises:
        ModelError: the signature is missing, or does not match the identity or a file.
        SettingsError: Sigstore's keys cannot be loaded, or model-signing is not installed.
    """
    with_signing = load_extra("model_signing.verifying", "publish")
    try:
        verifier = with_signing.Config().use_sigstore_verifier(
            identity=identity, oidc_issuer=issuer, trust_config=trust_config
        )
    except Exception as error:  # sigstore raises many types
        where = trust_config or "the network; --trust_config names a file"
        raise SettingsError(f"Sigstore's keys cannot be loaded from {where}: {one_line(error)}") from error
    _verify(folder, published, verifier, identity)


def _verify(folder: Path, published: Published, verifier: Any, signer: object) -> None:
    if SIGNATURE not in published.files:
        raise ModelError(f"{folder} is not signed: it has no {SIGNATURE}; publish it with --sign_key")
    ignoring = load_extra("model_signing.hashing", "publish").Config()
    ignoring.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    with written_out(folder, published) as copy:  # model-signing reads a folder, and the original may change
        try:
            verifier.set_hashing_config(ignoring).verify(copy, copy / SIGNATURE)
        except Exception as error:  # a damaged bundle raises many types
            reason = one_line(error)
            raise ModelError(
                f"{folder} is not signed by {signer}: {reason}; name who signed it, or publish the run again"
            ) from error


@contextmanager
def written_out(folder: Path, published: Published) -> Iterator[Path]:
    """Yield a temporary folder with the files of a published model.

    Args:
        folder: original, for messages.

    Raises:
        ModelError: the files cannot be written.
    """
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(scratch_folder())
            for name, content in published.files.items():
                (copy / name).write_bytes(content)
        except StorageError as error:
            raise ModelError(f"{folder} cannot be copied: {error}") from error
        except OSError as error:
            raise ModelError(
                f"{folder} cannot be copied to a temporary folder ({error.strerror}); name another one in TMPDIR"
            ) from error
        yield copy
