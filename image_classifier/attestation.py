"""Turns a verification into a signed verdict in the run folder, which others can check without training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from image_classifier.errors import RunError, SettingsError, StorageError
from image_classifier.published.attestation import (
    EXPORT,
    FORMAT_VERSION,
    MANIFEST,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    WEIGHTS,
    format_time,
    parse_statement,
    serialize_statement,
)
from image_classifier.published.folder import ATTESTATIONS, MODEL, PUBLISHED, find_published, read_published
from image_classifier.publishing.onnx import export_model
from image_classifier.publishing.signing import StatementSigner, build_statement_signer
from image_classifier.storage import DISK, storage_error, write_atomically
from image_classifier.text import one_line
from image_classifier.tracking import checking, layout, reading
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.identity import describe_processor, describe_processor_family
from image_classifier.verification import Checked, Verdict, Verification


def prepare(folder: Path, sign_key: str) -> StatementSigner:
    """Check before the training that a verdict can be signed and written, and return the signer.

    Raises:
        ImageClassifierError: the key cannot be used, or the folder is not writable.
    """
    sign = build_statement_signer(sign_key)
    place = folder / ATTESTATIONS
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
        raise RunError(f"{place} is not a folder (links are not followed); remove it")
    if folder.is_dir() and not os.access(place if place.is_dir() else folder, os.W_OK):
        raise StorageError(f"cannot write to {folder}: the verdict could not be saved; verify a copy")
    return sign


def attest(
    folder: Path,
    verification: Verification,
    sign: StatementSigner,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Sign a verdict, and write it to the run and to its published model.

    Args:
        say: receives a line about anything that is not attested.

    Returns:
        The paths of the files.

    Raises:
        RunError: the verdict proves nothing to others, or the run was changed meanwhile.
        ModelError: it cannot be signed.
        StorageError: it cannot be written.
    """
    return _keep(folder, serialize_verdict(folder, verification, clock=clock, say=say), sign)


def sign_statement(folder: Path, statement: bytes, sign: StatementSigner) -> list[Path]:
    """Sign a verdict of another machine, and write it as `attest` does.

    Args:
        statement: result of `serialize_verdict` there. The signer vouches for it.

    Raises:
        RunError: it is not a statement about this run and its published model.
        ModelError: it cannot be signed.
        StorageError: it cannot be written.
    """
    try:
        said = parse_statement(statement)
        if serialize_statement(said) != statement:
            raise ValueError("its encoding is not canonical")
    except ValueError as error:
        raise RunError(f"nothing is attested of {folder}: the statement cannot be used: {one_line(error)}") from error
    if checking.verify_files(folder):
        raise RunError(f"nothing is attested of {folder}: its files do not match its manifest")
    manifest = reading.read_manifest(folder)
    expected = _list_subjects(folder, manifest)
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in said["subject"]}
    if EXPORT in subjects:
        published = read_published(find_published(folder / PUBLISHED))
        expected[EXPORT] = hashlib.sha256(published.files[MODEL]).hexdigest()
    if subjects != expected or said["predicate"]["run"] != _describe_run(reading.read_record(folder), manifest):
        raise RunError(f"nothing is attested of {folder}: the statement is about another run")
    return _keep(folder, statement, sign)


def serialize_verdict(
    folder: Path,
    verification: Verification,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    say: Callable[[str], None] = lambda line: None,
) -> bytes:
    """Serialize the unsigned statement of a verdict.

    Args:
        say: receives a line about anything that is not attested.

    Raises:
        RunError: the verdict proves nothing to others, or the run was changed meanwhile.
    """
    checked = verification.checked
    if checked is None:
        raise RunError(f"nothing is attested of {folder}: it was not trained again")
    if verification.verdict is Verdict.DIFFERENT and _has_other_code(checked):
        raise RunError(
            f"nothing is attested of {folder}: other code or libraries on this machine may cause the difference"
        )
    if checking.verify_files(folder) or reading.read_manifest(folder) != checked.manifest:
        raise RunError(f"nothing is attested of {folder}: it was changed while it was verified")
    subjects = _list_subjects(folder, checked.manifest)
    if verification.verdict is Verdict.IDENTICAL and os.path.lexists(folder / PUBLISHED):
        export = find_export(folder, say)
        subjects |= {EXPORT: export} if export is not None else {}
    statement = serialize_statement(build_statement(verification, checked, subjects, clock()))
    parse_statement(statement)
    return statement


def _list_subjects(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """List the subjects of every statement about a run, with their sha256."""
    manifest_digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return {WEIGHTS: manifest["files"][WEIGHTS]["sha256"], MANIFEST: manifest_digest}


def _describe_run(record: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "experiment_name": record["experiment_name"],
        "run_name": record["run_name"],
        "manifest_digest": manifest["digest"],
        "record_digest": manifest["files"][layout.RECORD]["sha256"],
        "weights_digest": manifest["weights_digest"],
        "chain_head": manifest["chain_head"],
    }


def _keep(folder: Path, statement: bytes, sign: StatementSigner) -> list[Path]:
    """Sign a statement, and write it to the run and to its published model."""
    content = sign(statement)
    suffix = ".sigstore.json" if b'"mediaType"' in content else ".json"
    name = f"verdict-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    places = [folder, *([folder / PUBLISHED] if os.path.lexists(folder / PUBLISHED) else [])]
    return [_write(place / ATTESTATIONS / name, content) for place in places]


def _has_other_code(checked: Checked) -> bool:
    """Return whether code or libraries that may influence bits differ from those of the run."""
    is_portable = checked.record["settings"].get("instruction_set") == "portable"
    parts = ("code",) if is_portable else ("code", "environment")
    return any(checked.record[part]["digest"] != checked.again[part]["digest"] for part in parts)


def find_export(folder: Path, say: Callable[[str], None]) -> str | None:
    """Return the sha256 of a run's published model if exporting the weights again gives the same bytes."""
    published = read_published(find_published(folder / PUBLISHED))
    manifest = published.manifest
    try:
        content = export_model(load_model(folder / WEIGHTS), views=manifest["views"], opset=manifest["opset"])
    except SettingsError as error:  # the extra for the export is not installed
        say(f"{MODEL} is not attested: {error}")
        return None
    if content != published.files[MODEL]:
        say(f"{MODEL} is not attested: exporting the weights here gives other bytes")
        return None
    return hashlib.sha256(content).hexdigest()


def build_statement(
    verification: Verification, checked: Checked, subjects: dict[str, str], now: datetime
) -> dict[str, Any]:
    """Build the in-toto statement of a verdict, which verdict.schema.json describes.

    Args:
        subjects: sha256 by name.
    """
    record, again = checked.record, checked.again
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "format_version": FORMAT_VERSION,
            "verdict": str(verification.verdict),
            "reasons": list(verification.reasons),
            "run": _describe_run(record, checked.manifest),
            "recorded": {
                **{part: record[part]["digest"] for part in ("data", "code", "environment", "machine")},
                "kernels": record["machine"]["class"].get("kernels"),
            },
            "checked": {
                "kind": checked.kind,
                "num_steps": checked.num_steps,
                "num_digests": checked.num_digests,
                "segments": [list(segment) for segment in checked.segments],
                "nonce": checked.nonce,
            },
            "machine": {
                **again["machine"],
                "processor": describe_processor(),
                "processor_family": describe_processor_family(),
            },
            "verifier": {
                "version": again["code"]["version"],
                "code": again["code"]["digest"],
                "environment": again["environment"]["digest"],
            },
            "verified_at": format_time(now),
        },
    }


def _write(path: Path, content: bytes) -> Path:
    try:
        if not path.parent.is_dir():
            DISK.make_folder(path.parent)
        write_atomically(path, content)
    except OSError as error:
        raise storage_error(path, error) from error
    return path
