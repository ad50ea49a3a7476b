"""Verdicts about a published model's run, for display. `policy.py` checks those that decisions rely on."""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier import files
from image_classifier.errors import ModelError
from image_classifier.published.attestation import describe_checked, parse_statement, read_attestations
from image_classifier.published.policy import Tally


@dataclass(frozen=True)
class Verdict:
    """A verdict about a published model's run.

    Attributes:
        verdict: IDENTICAL or DIFFERENT.
        signer: name in the policy; None if no signature was checked.
        checked: what was trained again.
        processor_family: of the machine that trained again.
        verified_at: time, such as 2026-01-31T12:00:00Z.
    """

    verdict: str
    signer: str | None
    checked: str
    processor_family: str
    verified_at: str


def read_verdicts(folder: Path, manifest: dict[str, Any], tally: Tally | None = None) -> tuple[Verdict, ...]:
    """Read the verdicts about a published model's run. Files that are no verdicts are skipped.

    Args:
        tally: attestations that a policy accepted; only these have a signer.
    """
    signers = {each.file: each.signer.name for each in tally.counted} if tally else {}
    contents: dict[str, bytes] = {}
    with suppress(ModelError):
        contents, _ = read_attestations(folder)
    verdicts = []
    for name, content in contents.items():
        with suppress(ValueError, KeyError, TypeError):
            predicate = parse_statement(_find_payload(content))["predicate"]
            if predicate["run"]["manifest_digest"] == manifest.get("run_manifest_digest"):
                verdicts.append(
                    Verdict(
                        predicate["verdict"],
                        signers.get(name),
                        describe_checked(predicate["checked"]),
                        predicate["machine"]["processor_family"],
                        predicate["verified_at"],
                    )
                )
    return tuple(sorted(verdicts, key=lambda each: (each.signer is None, each.signer or "", each.verified_at)))


def _find_payload(content: bytes) -> bytes:
    """Return the payload of a DSSE envelope or a Sigstore bundle, without checking the signature."""
    document = files.parse_json(content)
    return base64.b64decode(document.get("dsseEnvelope", document)["payload"], validate=True)
