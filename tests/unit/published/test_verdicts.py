"""The verdicts beside a published model, as people are shown them: whose signature counts, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.published.attestation import read_attestations
from image_classifier.published.policy import Subject, count, load_policy
from image_classifier.published.verdicts import Verdict, read_verdicts
from image_classifier.tracking.reading import read_manifest
from tests.attestations import NOW, put, sign, state, write_policy
from tests.published import write_keys
from tests.runs import write_run


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two private keys, and a policy by which the owner of the first counts."""
    folder = tmp_path_factory.mktemp("keys")
    alice, public = write_keys(folder, "alice", ec.SECP256R1())
    mallory, _ = write_keys(folder, "mallory", ec.SECP256R1())
    return alice, mallory, write_policy(folder / "policy.json", {"alice": public})


def test_only_a_checked_signature_has_a_name(tmp_path: Path, keys: tuple[Path, Path, Path]) -> None:
    alice, mallory, policy = keys
    run = write_run(tmp_path)
    put(run, sign(state(run), alice))
    put(run, sign(state(run, kind="sample", family="aarch64 ARM"), mallory))
    put(run, sign(state(write_run(tmp_path, "another/run")), alice))
    put(run, b"{}")
    put(run, b"no JSON")
    digest = read_manifest(run)["digest"]
    contents, _ = read_attestations(run)
    tally = count(Subject("run", digest, {}), contents, load_policy(policy), NOW)

    checked = Verdict("IDENTICAL", "alice", "all 300 steps", "x86_64 GenuineIntel 6", "2026-06-01T12:00:00Z")
    unchecked = Verdict("IDENTICAL", None, "drawn segments 100:200 of 300 steps", "aarch64 ARM", "2026-06-01T12:00:00Z")
    assert read_verdicts(run, {"run_manifest_digest": digest}, tally) == (checked, unchecked)
    assert [each.signer for each in read_verdicts(run, {"run_manifest_digest": digest})] == [None, None]
    assert read_verdicts(run, {}) == ()


def test_a_folder_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "attestations").symlink_to(tmp_path)
    assert read_verdicts(tmp_path, {}) == ()
