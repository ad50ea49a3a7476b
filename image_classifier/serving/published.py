"""The folder of a published model: its files, its manifest, and whether both are what was published. Free of torch.

::

    model.onnx        uint8 [N, 32, 32, 3] RGB in, float32 [N, C] probabilities out; describes itself
    model.int8.onnx   the same in 8 bits, where that was found worth having
    parity.json       how far the answers are from the trainer's
    MODEL_CARD.md     what the model is, for people and for Hugging Face
    sbom.cdx.json     the software that made it (CycloneDX)
    manifest.json     size and sha256 of each of these files, written last
    model.sig         a signature over all of them (a Sigstore bundle, by OpenSSF's model-signing), if there is one
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from image_classifier.errors import ModelError, SettingsError
from image_classifier.extras import load_extra

FORMAT_VERSION = 1
MODEL = "model.onnx"
INT8_MODEL = "model.int8.onnx"
PARITY = "parity.json"
CARD = "MODEL_CARD.md"
SBOM = "sbom.cdx.json"
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
PUBLISHED = "published"
"""Name of the folder in that of the run."""

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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a published model.

    Raises:
        ModelError: it is missing, changed, or of a later format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder} is no published model: it has no {MANIFEST}; make one with: publish RUN")
    try:
        raw = path.read_bytes()
        manifest: dict[str, Any] = json.loads(raw)
        version = int(manifest["format_version"])
        if version > FORMAT_VERSION:
            raise ModelError(
                f"{path} has the format {version}; this version reads up to {FORMAT_VERSION}: install a later one"
            )
        if any(key not in manifest for key in _NEEDS) or serialize_manifest(manifest) != raw:
            raise ValueError("its content does not have the digest that it names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} was changed or is damaged: {error}; publish the run again") from error
    return manifest


def read_file(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Read a file of a published model whose content is what the manifest says.

    Raises:
        ModelError: it is not.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; publish the run again") from error
    if describe_content(content) != manifest["files"].get(name):
        raise ModelError(f"{path} was changed after it was published: it is not what {MANIFEST} says; publish again")
    return content


def check_published(folder: Path, public_key: Path | None = None) -> dict[str, Any]:
    """Check every file of a published model against its manifest, and all against the signature; return the manifest.

    Args:
        public_key: PEM file of the elliptic curve key that the model must be signed by; None checks no signature.

    Raises:
        ModelError: a file is missing or was changed, or the signature is missing, another's, or of other content.
        SettingsError: the key cannot be read, or is of another kind.
    """
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        read_file(folder, name, manifest)
    if public_key is not None:
        check_signature(folder, public_key)
    return manifest


def check_signature(folder: Path, public_key: Path) -> None:
    """Check that a published model was signed, as it is, by the owner of a key.

    Raises:
        ModelError: there is no signature, it is another's, or a file is not what was signed.
        SettingsError: the key cannot be read, or is of another kind, or model-signing is not installed.
    """
    with_signing = load_extra("model_signing.verifying", "publish")
    try:
        verifier = with_signing.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SettingsError(f"{public_key} is no public key that can verify: {one_line(error)}") from error
    _verify(folder, verifier, public_key)


def check_identity_signature(folder: Path, identity: str, issuer: str, trust_config: Path | None = None) -> None:
    """Check that a published model was signed, as it is, by an identity that Sigstore has vouched for.

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
    _verify(folder, verifier, identity)


def _verify(folder: Path, verifier: Any, signer: object) -> None:
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise ModelError(f"{folder} is not signed: it has no {SIGNATURE}; publish it with --sign_key")
    try:
        ignoring = load_extra("model_signing.hashing", "publish").Config()
        ignoring.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
        verifier.set_hashing_config(ignoring).verify(folder, signature)
    except Exception as error:  # what a damaged bundle raises is of many types
        raise ModelError(f"{folder} is not signed by {signer}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
