"""Signed verdicts: reads and checks in-toto statements in DSSE envelopes or Sigstore bundles.

::

    attestations/verdict-*.json            a DSSE envelope, signed with a key
    attestations/verdict-*.sigstore.json   a Sigstore bundle, signed by an identity

`verdict.schema.json` describes the statement.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from image_classifier import files
from image_classifier.errors import ModelError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.published.folder import ATTESTATIONS
from image_classifier.storage import TEMPORARY_PREFIX
from image_classifier.text import is_digest, one_line

Kind = Literal["all", "sample", "segment"]
"""What was trained again: all steps, randomly drawn segments, or one chosen segment."""

FORMAT_VERSION = 1
PREDICATE_TYPE = "urn:image-classifier:verdict:v1"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MANIFEST, WEIGHTS, EXPORT = "manifest.json", "model.pth", "published/model.onnx"
"""Names of the statement's subjects."""
MAX_BYTES = 2**18
"""Size limit of an attestation."""
MAX_FILES = 256
"""Limit of attestations in a folder."""
MAX_KEY_BYTES = 2**14

_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_ENVELOPE_FORM = {"payload": str, "payloadType": str, "signatures": [{"keyid": str, "sig": str}]}
_TEXT_OR_NONE = (str, type(None))
_FORM = {
    "subject": [{"name": str, "digest": {"sha256": str}}],
    "predicate": {
        "verdict": str,
        "reasons": [str],
        "run": dict.fromkeys(
            ("experiment_name", "run_name", "manifest_digest", "record_digest", "weights_digest", "chain_head"), str
        ),
        "recorded": {**dict.fromkeys(("data", "code", "environment", "machine"), str), "kernels": _TEXT_OR_NONE},
        "checked": {"kind": str, "num_steps": int, "num_digests": int, "segments": [[int]], "nonce": _TEXT_OR_NONE},
        "machine": {"class": {}, "digest": str, "processor": str, "processor_family": str},
        "verifier": dict.fromkeys(("version", "code", "environment"), str),
        "verified_at": str,
    },
}


@dataclass(frozen=True)
class Key:
    """An elliptic-curve public key.

    Attributes:
        path: its PEM file.
        public: public key object of `cryptography`.
        id: sha256 of its DER encoding (SubjectPublicKeyInfo) in hexadecimal digits.
    """

    path: Path
    public: Any
    id: str


@dataclass(frozen=True)
class Signer:
    """The owner of a key, or a Sigstore identity.

    Attributes:
        name: for messages.
        key: None for an identity.
        identity: such as a workflow's URL; empty for a key.
        issuer: OIDC issuer of the identity.
    """

    name: str
    key: Key | None = None
    identity: str = ""
    issuer: str = ""

    @property
    def id(self) -> tuple[str, str]:
        """Identifies the signer, whatever its name."""
        return (self.key.id, "") if self.key else (self.identity, self.issuer)


@dataclass(frozen=True)
class Attestation:
    """A verdict with a verified signature.

    Attributes:
        file: file name.
        statement: the signed statement.
    """

    file: str
    signer: Signer
    statement: dict[str, Any]

    @property
    def predicate(self) -> dict[str, Any]:
        """The verdict, in the terms of in-toto the predicate."""
        predicate: dict[str, Any] = self.statement["predicate"]
        return predicate

    @property
    def subjects(self) -> dict[str, str]:
        """The sha256 of each subject, by name."""
        return {subject["name"]: subject["digest"]["sha256"] for subject in self.statement["subject"]}

    @property
    def verified_at(self) -> datetime:
        """Time of the verdict."""
        return datetime.fromisoformat(self.predicate["verified_at"])

    def describe(self) -> str:
        """Describe the verdict on one line."""
        predicate, machine = self.predicate, self.predicate["machine"]
        what = describe_checked(predicate["checked"]) if predicate["verdict"] == "IDENTICAL" else predicate["reasons"]
        words = what if isinstance(what, str) else "; ".join(what)[:200] or "no reason given"
        when = predicate["verified_at"][:10]
        return f"{self.signer.name}: {predicate['verdict']}, {words}, on {machine['processor_family']}, {when}"


def describe_checked(checked: dict[str, Any]) -> str:
    """Describe what was trained again."""
    if checked["kind"] == "all":
        return f"all {checked['num_steps']} steps"
    listed = ", ".join(f"{begin}:{end}" for begin, end in checked["segments"][:10])
    drawn = "drawn segments" if checked["kind"] == "sample" else "the chosen segment"
    return f"{drawn} {listed} of {checked['num_steps']} steps"


def load_key(path: Path) -> Key:
    """Load a public key from a PEM file.

    Raises:
        SettingsError: the file cannot be read, has more than one key, or a key of another type.
    """
    serialization = load_extra("cryptography.hazmat.primitives.serialization", "attest")
    try:
        content = files.read_file(path, MAX_KEY_BYTES)
        if content.count(b"-----BEGIN") > 1:
            raise ValueError("it has more than one key; use one file per key")
        public = serialization.load_pem_public_key(content)
        if not is_supported(public):
            raise ValueError("it is not on the curve P-256, P-384 or P-521")
    except Exception as error:  # `cryptography` raises several types
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingsError(f"{path} is not a usable public key: {reason}") from error
    return Key(path, public, compute_key_id(public))


def is_supported(public: Any) -> bool:
    """Return whether a public key of `cryptography` is on a supported curve."""
    curves = load_extra("cryptography.hazmat.primitives.asymmetric.ec", "attest")
    return isinstance(public, curves.EllipticCurvePublicKey) and public.curve.name in _HASHES


def compute_key_id(public: Any) -> str:
    """Compute the sha256 of a public key's DER encoding: openssl pkey -pubin -in KEY -outform DER | sha256sum."""
    serialization = load_extra("cryptography.hazmat.primitives.serialization", "attest")
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def compute_preimage(payload: bytes) -> bytes:
    """Compute the bytes that DSSE signs (its pre-authentication encoding)."""
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def build_hash(curve: str) -> Any:
    """Build the hash for a curve, as model-signing and in-toto choose it."""
    return getattr(load_extra("cryptography.hazmat.primitives.hashes", "attest"), _HASHES[curve])()


def serialize_statement(statement: dict[str, Any]) -> bytes:
    """Serialize a statement as canonical JSON."""
    return json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def serialize_envelope(payload: bytes, key_id: str, signature: bytes) -> bytes:
    """Serialize a DSSE envelope with one signature in its canonical form."""
    signatures = [{"keyid": key_id, "sig": base64.b64encode(signature).decode()}]
    content = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
    return (json.dumps(content, indent=2) + "\n").encode()


def read_attestations(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Read the files in the subfolder `attestations` of a folder.

    Returns:
        Contents by file name, and by file name the reasons why other files were not read.

    Raises:
        ModelError: it is not a folder, cannot be read, or has too many files.
    """
    folder = folder / ATTESTATIONS
    contents, refused = {}, {}
    if not os.path.lexists(folder):
        return {}, {}
    if folder.is_symlink() or not folder.is_dir():
        raise ModelError(f"{folder} is not a folder (links are not followed); put the attestations into one")
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(TEMPORARY_PREFIX))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
    if len(names) > MAX_FILES:
        raise ModelError(f"{folder} has more than the {MAX_FILES} files allowed; remove those of other models")
    for name in names:
        try:
            if (folder / name).is_symlink():
                raise ValueError("it is a symbolic link, which is not followed")
            contents[name] = files.read_file(folder / name, MAX_BYTES)
        except (OSError, ValueError) as error:
            refused[name] = getattr(error, "strerror", None) or one_line(error)
    return contents, refused


class Verifier:
    """Verifies which of several signers signed an attestation. It never uses the network.

    Args:
        trust_config: file with the keys of a private Sigstore instance. By default the public instance's keys, from the
            last download or from the package sigstore.
    """

    def __init__(self, signers: tuple[Signer, ...], trust_config: Path | None = None) -> None:
        self._owners = {signer.key.id: signer for signer in signers if signer.key}
        self._identities = [signer for signer in signers if not signer.key]
        self._trust_config = trust_config

    def verify(self, name: str, content: bytes) -> Attestation:
        """Verify the signature of an attestation.

        Args:
            name: of its file.

        Raises:
            ValueError: it is malformed, or signed by none of the signers.
            SettingsError: Sigstore's keys cannot be loaded, or an extra is not installed.
        """
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than the {MAX_BYTES:,} bytes allowed")
        document = files.parse_json(content)
        if isinstance(document, dict) and "mediaType" in document:
            signer, payload = self._verify_bundle(content)
        else:
            signer, payload = self._verify_envelope(content, document)
        return Attestation(name, signer, parse_statement(payload))

    def _verify_envelope(self, content: bytes, document: Any) -> tuple[Signer, bytes]:
        files.check_form(document, _ENVELOPE_FORM)
        if len(document["signatures"]) != 1:
            raise ValueError(f"it has {len(document['signatures'])} signatures instead of one")
        (signature,) = document["signatures"]
        if document["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its payloadType is {document['payloadType'][:50]!a} instead of {PAYLOAD_TYPE}")
        payload, signed = _decode(document["payload"]), _decode(signature["sig"])
        if serialize_envelope(payload, signature["keyid"], signed) != content:
            raise ValueError("its encoding is not canonical")
        signer = self._owners.get(signature["keyid"])
        if signer is None:
            raise ValueError("it is signed by none of the verifiers" if signature["keyid"] else "it names no key")
        assert signer.key is not None
        curves = load_extra("cryptography.hazmat.primitives.asymmetric.ec", "attest")
        exceptions = load_extra("cryptography.exceptions", "attest")
        algorithm = curves.ECDSA(build_hash(signer.key.public.curve.name))
        try:
            signer.key.public.verify(signed, compute_preimage(payload), algorithm)
        except exceptions.InvalidSignature as error:
            raise ValueError(f"its signature does not match the key of {signer.name}") from error
        return signer, payload

    def _verify_bundle(self, content: bytes) -> tuple[Signer, bytes]:
        if not self._identities:
            raise ValueError("it is signed by an identity, but the policy has none")
        models = load_extra("sigstore.models", "attest")
        policies = load_extra("sigstore.verify.policy", "attest")
        asked = [policies.Identity(identity=each.identity, issuer=each.issuer) for each in self._identities]
        sigstore = self._sigstore
        try:
            bundle = models.Bundle.from_json(content)
            kind, payload = sigstore.verify_dsse(bundle, policies.AnyOf(asked))
        except Exception as error:  # a damaged bundle raises many types
            raise ValueError(f"it is signed by none of the identities: {one_line(error)}") from error
        if kind != PAYLOAD_TYPE:
            raise ValueError(f"its payload has the type {kind[:50]!a}")
        for signer, policy in zip(self._identities, asked, strict=True):
            with suppress(load_extra("sigstore.errors", "attest").VerificationError):
                policy.verify(bundle.signing_certificate)
                return signer, payload
        raise AssertionError

    @cached_property
    def _sigstore(self) -> Any:
        trusting = load_extra("sigstore.models", "attest").ClientTrustConfig
        try:
            if self._trust_config is None:
                config = trusting.production(offline=True)
            else:
                config = trusting.from_json(files.read_file(self._trust_config, files.MAX_JSON_BYTES).decode())
            return load_extra("sigstore.verify", "attest").Verifier(trusted_root=config.trusted_root)
        except Exception as error:  # sigstore raises several types
            where = self._trust_config or "the cache; name a file as trust_config"
            raise SettingsError(f"Sigstore's keys cannot be loaded from {where}: {one_line(error)}") from error


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"it has invalid base64: {error}") from error


def parse_statement(payload: bytes) -> dict[str, Any]:
    """Parse a statement and check all fields that readers rely on.

    Raises:
        ValueError: it is not a verdict of this package, has another version, or a field is missing or invalid.
    """
    statement: dict[str, Any] = files.parse_json(payload)
    files.check_form(statement, {"_type": str, "predicateType": str, "predicate": {"format_version": int}})
    if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
        raise ValueError(
            f"it is not a verdict of this package: its predicateType is {statement['predicateType'][:80]!a}"
        )
    if statement["predicate"]["format_version"] != FORMAT_VERSION:
        version = statement["predicate"]["format_version"]
        raise ValueError(f"it has the format {version}; this version reads {FORMAT_VERSION}")
    files.check_form(statement, _FORM)
    predicate, names = statement["predicate"], [subject["name"] for subject in statement["subject"]]
    if len(set(names)) < len(names) or not {MANIFEST, WEIGHTS} <= set(names):
        raise ValueError(f"its subjects are not {MANIFEST} and {WEIGHTS}, each once")
    digests = [subject["digest"]["sha256"] for subject in statement["subject"]]
    digests += [predicate["run"][name] for name in ("manifest_digest", "record_digest")]
    if not all(map(is_digest, digests)):
        raise ValueError("it has an invalid sha256")
    if predicate["verdict"] not in ("IDENTICAL", "DIFFERENT"):
        raise ValueError(f"its verdict is {predicate['verdict'][:50]!a}")
    _check_extent(predicate["checked"])
    if not predicate["machine"]["processor_family"].strip():
        raise ValueError("it names no processor_family")
    if not _TIME.fullmatch(predicate["verified_at"]):
        raise ValueError(
            f"its verified_at is {predicate['verified_at'][:50]!a}, not a time such as 2026-01-31T12:00:00Z"
        )
    datetime.fromisoformat(predicate["verified_at"])
    return statement


def _check_extent(checked: dict[str, Any]) -> None:
    if checked["kind"] not in get_args(Kind):
        raise ValueError(f"its kind of check is {checked['kind'][:50]!a}")
    segments, num_steps = checked["segments"], checked["num_steps"]
    are_segments = all(len(pair) == 2 and 0 <= pair[0] < pair[1] <= num_steps for pair in segments)
    if not are_segments or bool(segments) == (checked["kind"] == "all") or min(num_steps, checked["num_digests"]) < 0:
        raise ValueError("its segments are not segments of the run")


def format_time(moment: datetime) -> str:
    """Format a time as in statements, such as 2026-01-31T12:00:00Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
