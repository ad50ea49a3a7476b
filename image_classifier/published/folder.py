"""The folder of a published model: its files, its manifest, and whether both are what was published. Free of torch.

::

    model.onnx        uint8 [N, S, S, 3] RGB in, float32 [N, C] probabilities out; describes itself
    model.int8.onnx   the same in 8 bits, where that was found worth having
    parity.json       how far the answers are from the trainer's
    drift_reference.json  what the test set was like, which `reference.py` reads; earlier versions wrote none
    MODEL_CARD.md     what the model is, for people and for Hugging Face
    samples.png       some test images side by side, where somebody asked for them
    sbom.cdx.json     the software that made it (CycloneDX)
    manifest.json     size and sha256 of each of these files, written last
    model.sig         a signature over all of them (a Sigstore bundle, by OpenSSF's model-signing), if there is one
    attestations/     signed verdicts about the run, which `attestation.py` reads; no part of what is signed
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
"""Of each file."""
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
"""Name of the folder in that of the run."""
RUN_RECORD = "run.json"
"""Name of the file by which a folder is known as a run."""
ATTESTATIONS = "attestations"
"""Name of the folder with signed verdicts, beside what they are about: no manifest names them, as more may come."""

_NUM_TRIES = 20  # to read a folder that is replaced meanwhile

_NEEDS = ("experiment_name", "run_name", "data_digest", "classes", "files", "digest")


def is_published(path: Path) -> bool:
    """Say whether a path is that of a published model: a folder with one, or an ONNX file."""
    return path.suffix == ".onnx" or (path / MODEL).is_file()


def find_published(path: Path) -> Path:
    """Find the published model in a run's folder, or take the path for one itself.

    Raises:
        ModelError: there is none.
    """
    for folder in (path, path / PUBLISHED):
        if (folder / MANIFEST).is_file() and (folder / MODEL).is_file():
            return folder
    raise ModelError(f"{path} holds no published model; make one with: image_classifier publish RUN")


def serialize_manifest(content: dict[str, Any]) -> bytes:
    """Serialize a manifest in the one way that `read_manifest` accepts, with the digest of its content."""
    content = {key: value for key, value in content.items() if key != "digest"}
    line = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(line.encode()).hexdigest()
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def describe_content(content: bytes) -> dict[str, Any]:
    """Describe a file's content for the manifest."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class Published:
    """A published model as it was read, all of it at one moment.

    Attributes:
        files: content by name, of each file of the manifest, of the manifest, and of the signature if there is one.
    """

    manifest: dict[str, Any]
    files: dict[str, bytes]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a published model.

    Raises:
        ModelError: it is missing, changed, or of a later format.
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
            raise ValueError("its content does not have the digest that it names")
        for name, facts in manifest["files"].items():
            if not _is_described(name, facts):
                raise ValueError(f"{name!a} is no name of a file with size and sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} was changed or is damaged: {error}; publish the run again") from error
    return manifest


def _is_described(name: str, facts: dict[str, Any]) -> bool:
    """Say whether a manifest has name, size and sha256 of a file in its own folder."""
    is_name = name.isprintable() and "/" not in name and name not in ("", ".", "..", MANIFEST, SIGNATURE, ATTESTATIONS)
    return is_name and facts.keys() == {"size", "sha256"} and type(facts["size"]) is int


def read_file(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Read a file of a published model whose content is what the manifest says.

    Raises:
        ModelError: it is not.
    """
    content = _read_bytes(folder / name)
    if describe_content(content) != manifest["files"].get(name):
        raise ModelError(
            f"{folder / name} was changed after it was published: it is not what {MANIFEST} says; publish again"
        )
    return content


def _read_bytes(path: Path) -> bytes:
    try:
        return files.read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}; publish the run again") from error


def read_published(folder: Path, public_key: Path | None = None) -> Published:
    """Read a published model whole; hold its files against its manifest, and all against its signature.

    A folder that is published anew meanwhile is read again, so that what is returned is the old or the new one.

    Args:
        public_key: PEM file of the elliptic curve key that the model must be signed by; None checks no signature.

    Raises:
        ModelError: a file is missing, was changed or is not in the manifest, or the signature is missing, another's,
            or of other content.
        SettingsError: the key cannot be read, or is of another kind.
    """
    for number in range(1, _NUM_TRIES + 1):
        manifest = read_manifest(folder)
        try:
            contents = {MANIFEST: serialize_manifest(manifest)}
            contents |= {name: read_file(folder, name, manifest) for name in manifest["files"]}
            if os.path.lexists(folder / SIGNATURE):
                contents[SIGNATURE] = _read_bytes(folder / SIGNATURE)
            _check_names(folder, manifest)
            published = Published(manifest, contents)
            if public_key is not None:
                check_signature(folder, published, public_key)
            return published
        except ModelError:
            if number == _NUM_TRIES or read_manifest(folder) == manifest:
                raise
            time.sleep(0.02)
    raise AssertionError


def _check_names(folder: Path, manifest: dict[str, Any]) -> None:
    known = {MANIFEST, SIGNATURE, ATTESTATIONS, *manifest["files"]}
    unknown = sorted(name for name in os.listdir(folder) if name not in known)
    if unknown:
        raise ModelError(
            f"{folder} holds {unknown[0]!a}, which its {MANIFEST} does not name: nobody knows where that is from; "
            "remove it, or publish again"
        )


def check_published(folder: Path, public_key: Path | None = None) -> dict[str, Any]:
    """Check a published model as `read_published` does, and return the manifest."""
    return read_published(folder, public_key).manifest


def check_signature(folder: Path, published: Published, public_key: Path) -> None:
    """Check that a published model was signed, as it was read, by the owner of a key.

    Raises:
        ModelError: there is no signature, it is another's, or a file is not what was signed.
        SettingsError: the key cannot be read, or is of another kind, or model-signing is not installed.
    """
    with_signing = load_extra("model_signing.verifying", "publish")
    try:
        verifier = with_signing.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SettingsError(f"{public_key} is no public key that can verify: {one_line(error)}") from error
    _verify(folder, published, verifier, public_key)


def check_identity_signature(
    folder: Path, published: Published, identity: str, issuer: str, trust_config: Path | None = None
) -> None:
    """Check that a published model was signed, as it was read, by an identity that Sigstore has vouched for.

    Args:
        identity: such as the address of a workflow: https://github.com/OWNER/REPOSITORY/.github/workflows/FILE@REF.
        issuer: of the identity's tokens, such as https://token.actions.githubusercontent.com.
        trust_config: file with the keys of a Sigstore of one's own; None fetches those of the public one.

    Raises:
        ModelError: there is no signature, it is another's, or a file is not what was signed.
        SettingsError: Sigstore's keys cannot be had, or model-signing is not installed.
    """
    with_signing = load_extra("model_signing.verifying", "publish")
    try:
        verifier = with_signing.Config().use_sigstore_verifier(
            identity=identity, oidc_issuer=issuer, trust_config=trust_config
        )
    except Exception as error:  # of a network, of a file, of its content
        where = trust_config or "the network; --trust_config names a file"
        raise SettingsError(f"Sigstore's keys cannot be had from {where}: {one_line(error)}") from error
    _verify(folder, published, verifier, identity)


def _verify(folder: Path, published: Published, verifier: Any, signer: object) -> None:
    if SIGNATURE not in published.files:
        raise ModelError(f"{folder} is not signed: it has no {SIGNATURE}; publish it with --sign_key")
    ignoring = load_extra("model_signing.hashing", "publish").Config()
    ignoring.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    with written_out(folder, published) as copy:  # model-signing takes folders alone, and the other one may change
        try:
            verifier.set_hashing_config(ignoring).verify(copy, copy / SIGNATURE)
        except Exception as error:  # what a damaged bundle raises is of many types
            raise ModelError(f"{folder} is not signed by {signer}: {one_line(error)}") from error


@contextmanager
def written_out(folder: Path, published: Published) -> Iterator[Path]:
    """Yield a temporary folder with the files of a published model as they were read from its own.

    Raises:
        ModelError: there is no room for one.
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
