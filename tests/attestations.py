"""Verdicts about runs that were written in milliseconds, as `verify --attest` signs them after a training."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from image_classifier.attestation import build_statement
from image_classifier.published.attestation import EXPORT, MANIFEST, WEIGHTS, Kind, serialize_statement
from image_classifier.published.folder import ATTESTATIONS
from image_classifier.publishing.signing import build_statement_signer
from image_classifier.tracking.reading import read_manifest, read_record
from image_classifier.verification import Checked, Verdict, Verification

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def state(
    run: Path,
    *,
    verdict: Verdict = Verdict.IDENTICAL,
    kind: Kind = "all",
    at: datetime = NOW,
    family: str = "x86_64 GenuineIntel 6",
    export: bytes | None = None,
) -> dict[str, Any]:
    """Build the statement of somebody who has trained a run again, on a processor of this family.

    Args:
        export: what exporting the run's weights gave.
    """
    record, manifest = read_record(run), read_manifest(run)
    segments = () if kind == "all" else ((100, 200),)
    nonce = "nonce" if kind == "sample" else None
    checked = Checked(manifest, record, record, kind, segments, 300, 3, nonce)
    subjects = {WEIGHTS: manifest["files"]["model.pth"]["sha256"]}
    subjects[MANIFEST] = hashlib.sha256((run / "manifest.json").read_bytes()).hexdigest()
    if export is not None:
        subjects[EXPORT] = hashlib.sha256(export).hexdigest()
    reason = "the first difference is at step 40" if verdict is Verdict.DIFFERENT else "3 digests are equal"
    statement = build_statement(Verification(verdict, (reason,), checked), checked, subjects, at)
    statement["predicate"]["machine"]["processor_family"] = family
    return statement


def sign(statement: dict[str, Any], key: Path) -> bytes:
    """Sign a statement with a private key."""
    return build_statement_signer(str(key))(serialize_statement(statement))


def put(folder: Path, content: bytes) -> Path:
    """Put an attestation beside a run or a published model, and return its path."""
    (folder / ATTESTATIONS).mkdir(exist_ok=True)
    path = folder / ATTESTATIONS / f"verdict-{hashlib.sha256(content).hexdigest()[:12]}.json"
    path.write_bytes(content)
    return path


def write_policy(path: Path, public_keys: dict[str, Path], **values: Any) -> Path:
    """Write a policy by which the owners of these public keys count; JSON is YAML."""
    listed = [{"name": name, "public_key": str(key)} for name, key in public_keys.items()]
    content = {"format_version": 1, "threshold": len(listed), "verifiers": listed}
    path.write_text(json.dumps(content | values))
    return path
