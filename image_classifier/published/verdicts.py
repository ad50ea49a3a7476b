"""What lies beside a published model about its run, for people to read; what is relied on is `policy.py`'s to check."""

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
    """What somebody says about the run of a published model.

    Attributes:
        verdict: IDENTICAL or DIFFERENT.
        signer: as the policy names whoever signed it; None where no signature was checked.
        checked: what was trained again.
        processor_family: on which that was found.
        verified_at: when, such as 2026-01-31T12:00:00Z.
    """

    verdict: str
    signer: str | None
    checked: str
    processor_family: str
    verified_at: str


def read_verdicts(folder: Path, manifest: dict[str, Any], tally: Tally | None = None) -> tuple[Verdict, ...]:
    """Read the attestations beside a published model that are about its run; what is none is passed over.

    Args:
        tally: of the attestations that a policy counts; the others say what nobody has checked.
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
    """Find the payload of a DSSE envelope, or of the one in a Sigstore bundle, whoever has signed it."""
    document = files.parse_json(content)
    return base64.b64decode(document.get("dsseEnvelope", document)["payload"], validate=True)
