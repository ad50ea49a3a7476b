"""Draws random segments of a run to verify, and computes the probability of detecting false ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from image_classifier.errors import RunError, SettingsError
from image_classifier.text import count
from image_classifier.tracking.checkpoint import Checkpoints
from image_classifier.tracking.layout import CHAIN, CHECKPOINTS


@dataclass(frozen=True)
class Audit:
    """Which segments of a run were drawn.

    Attributes:
        num_segments: of the run.
        drawn: from which step to which, ascending.
        last_step: of the run, from whose checkpoint the result is computed again.
        nonce: what they were drawn with.
    """

    num_segments: int
    drawn: tuple[tuple[int, int], ...]
    last_step: int
    nonce: str

    def describe(self) -> tuple[str, str, str]:
        """Describe how they were drawn, and how probably a false segment would have been among them."""
        total, most = self.num_segments, max(1, self.num_segments // 2)
        chances = {
            number: compute_detection(total, len(self.drawn), number)
            for number in sorted({1, 2, most})
            if number <= most
        }
        listed = ", ".join(f"{number} with probability {chance:.1%}" for number, chance in chances.items())
        return (
            f"{len(self.drawn)} of {total} segments were drawn from the manifest's digest and the nonce {self.nonce}",
            f"if some of the {total} were false, one would have been caught: of {listed}",
            "what the last checkpoint gives is equal: the weights and the probabilities of the test set",
        )


def compute_detection(num_segments: int, num_drawn: int, num_false: int) -> float:
    """Compute the probability that one of the false segments is among those that were drawn."""
    return 1 - comb(num_segments - num_false, num_drawn) / comb(num_segments, num_drawn)


def list_segments(checkpoints: Sequence[int], chain: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """List the segments between two checkpoints whose states have digests in the chain; the first begins at step 0."""
    digested = {line["step"] for line in chain if "tensors" in line}
    bounds = [0, *(step for step in checkpoints if step in digested and step > 0)]
    return list(zip(bounds, bounds[1:], strict=False))


def draw_segments(
    segments: Sequence[tuple[int, int]], number: int, digest: str, nonce: str
) -> tuple[tuple[int, int], ...]:
    """Draw some of the segments: those for which the sha256 of digest, nonce and place is the smallest.

    Whoever knows digest and nonce can draw again; whoever made the run had to have its digest before the nonce.
    """

    def compute_lot(place: int) -> bytes:
        return hashlib.sha256(f"{digest}\0{nonce}\0{place}".encode()).digest()

    places = sorted(range(len(segments)), key=compute_lot)[:number]
    return tuple(segments[place] for place in sorted(places))


def build_audit(
    folder: Path,
    manifest: dict[str, Any],
    record: dict[str, Any],
    chain: Sequence[dict[str, Any]],
    number: int,
    nonce: str,
) -> Audit:
    """Draw segments of a finished run.

    Raises:
        SettingsError: it has fewer, or lacks the checkpoints that it takes.
        RunError: its chain is none.
    """
    steps = [line["step"] for line in chain if "tensors" in line]
    if steps != sorted(set(steps)):
        raise RunError(f"{folder / CHAIN} is damaged: its steps are not in ascending order")
    last = max(steps, default=0)
    segments = list_segments(Checkpoints(folder / CHECKPOINTS).list_steps(), chain)
    if not segments or segments[-1][1] != last:
        raise SettingsError(
            f"--sample needs checkpoints with digests in the chain, but {folder} has none of its last step {last}; "
            "verify without --sample, or train with --keep_checkpoints all"
        )
    if record["settings"].get("keep") == "best" or record["settings"].get("early_stopping"):
        raise SettingsError(
            "--sample cannot check which epoch was the best, because the chain has no digest of it, but --keep best "
            "and "
            "--early_stopping depend on it; verify all steps"
        )
    if number > len(segments):
        present = count(len(segments), "segment")
        raise SettingsError(
            f"--sample {number}: {folder} has {present} between checkpoints with digests in the chain; take fewer, or "
            "train with --keep_checkpoints all"
        )
    return Audit(len(segments), draw_segments(segments, number, manifest["digest"], nonce), last, nonce)
