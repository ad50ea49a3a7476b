"""Policies: who must have verified a run before its model is used, and which attestations meet a policy.

Only the folder and the policy matter; the network is not used.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast, get_args

from image_classifier import files
from image_classifier.errors import ModelError, SettingsError, VerdictError
from image_classifier.published.attestation import (
    EXPORT,
    WEIGHTS,
    Attestation,
    Kind,
    Signer,
    Verifier,
    load_key,
    read_attestations,
)
from image_classifier.published.folder import (
    ATTESTATIONS,
    MODEL,
    Published,
    check_identity_signature,
    check_signature,
)
from image_classifier.text import list_first, one_line

FORMAT_VERSION = 1
MAX_SIGNERS = 64
CLOCK_SKEW = timedelta(minutes=5)
"""Tolerance for clocks of other machines."""

_THRESHOLD = re.compile(r"([1-9]\d?)-of-([1-9]\d?)", re.ASCII)
_NUM_NAMED = 5  # attestations that a message lists
_KEYS = {
    *("format_version", "threshold", "verifiers", "publishers"),
    *("min_processor_families", "max_age_days", "kinds", "trust_config"),
}
_SIGNER_FORM = {"name": str}


@dataclass(frozen=True)
class Policy:
    """Who must have verified a run, and how.

    Attributes:
        source: name of the policy in messages.
        threshold: number of verifiers who must have found the run IDENTICAL.
        publishers: one of them must have signed a published model, unless the verdicts name the model's digest.
        min_processor_families: number of processor families that the verdicts must cover.
        max_age_days: maximum age of a verdict; None for any age.
        kinds: accepted kinds of verification.
        trust_config: file with the keys of a private Sigstore instance.
    """

    source: str
    threshold: int
    verifiers: tuple[Signer, ...]
    publishers: tuple[Signer, ...] = ()
    min_processor_families: int = 1
    max_age_days: float | None = None
    kinds: tuple[Kind, ...] = ("all",)
    trust_config: Path | None = None

    def __post_init__(self) -> None:
        for group, signers in (("verifiers", self.verifiers), ("publishers", self.publishers)):
            self._check(len(signers) <= MAX_SIGNERS, f"it has more than {MAX_SIGNERS} {group}")
            names, ids = [signer.name for signer in signers], [signer.id for signer in signers]
            twice = next((signer.name for signer in signers if ids.count(signer.id) > 1), None)
            self._check(twice is None, f"{twice} is twice among its {group}: a key or identity counts once")
            self._check(len(set(names)) == len(names), f"two of its {group} have the same name")
        most = len(self.verifiers)
        self._check(1 <= self.threshold <= most, f"it asks for {self.threshold} of its {most} verifiers")
        self._check(
            self.min_processor_families >= 1, f"min_processor_families is {self.min_processor_families}, not 1 or more"
        )
        age = self.max_age_days
        self._check(age is None or 0 < age < math.inf, f"max_age_days is {age}, not a number above 0")
        kinds = self.kinds
        is_list = 0 < len(kinds) == len(set(kinds)) and set(kinds) <= set(get_args(Kind))
        self._check(is_list, f"kinds takes one or more of {', '.join(get_args(Kind))}, each once")

    def _check(self, is_good: bool, reason: str) -> None:
        if not is_good:
            raise SettingsError(f"{self.source} is not valid: {reason}")


@dataclass(frozen=True)
class Subject:
    """The run that attestations must be about.

    Attributes:
        title: for messages.
        manifest_digest: digest in the run's manifest.
        digests: sha256 by name of further files that an attestation must name.
    """

    title: str
    manifest_digest: str
    digests: dict[str, str]


@dataclass(frozen=True)
class Tally:
    """Attestations, counted by a policy.

    Attributes:
        counted: accepted ones.
        missing: names of verifiers without an accepted one.
        ignored: reasons why others do not count, by file name.
    """

    counted: tuple[Attestation, ...]
    missing: tuple[str, ...]
    ignored: dict[str, str]

    def describe_ignored(self) -> list[str]:
        """Describe what does not count: a line for each reason, with its files."""
        names: dict[str, list[str]] = {}
        for name, reason in sorted(self.ignored.items()):
            names.setdefault(reason, []).append(name)
        return [f"{list_first(group, _NUM_NAMED)}: {reason}" for reason, group in names.items()]


def parse_threshold(text: str) -> tuple[int, int]:
    """Parse a threshold such as 2-of-3.

    Raises:
        SettingsError: it is malformed.
    """
    match = _THRESHOLD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise SettingsError(f"--threshold takes K-of-N, such as 2-of-3, got: {text!a}")
    return int(match[1]), int(match[2])


def build_policy(threshold: int, public_keys: Sequence[Path]) -> Policy:
    """Build a policy that requires verdicts from `threshold` of the owners of these keys.

    Raises:
        SettingsError: a key cannot be read, is repeated, or has another type.
    """
    signers = tuple(Signer(str(path), load_key(path)) for path in public_keys)
    return Policy("--threshold", threshold, signers)


def load_policy(path: Path) -> Policy:
    """Load a policy from a YAML file. Paths in it are relative to the file.

    Raises:
        SettingsError: it cannot be read, or is malformed or contradictory.
    """
    try:
        content = files.load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingsError(f"--policy {path} cannot be read: {reason}") from error
    return parse_policy(content, path)


def parse_policy(content: Any, path: Path) -> Policy:
    """Parse the content of a policy.

    Raises:
        SettingsError: it is malformed or contradictory, or a key cannot be read.
    """
    try:
        files.check_form(content, {"format_version": int})
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it has the format {content['format_version']}; this version reads {FORMAT_VERSION}")
        _check_names(content, _KEYS)
        files.check_form(content, {"threshold": int, "verifiers": [_SIGNER_FORM]})
        number = (int, float, type(None))
        forms = {"publishers": [_SIGNER_FORM], "min_processor_families": int, "max_age_days": number}
        forms |= {"kinds": [str], "trust_config": str}
        files.check_form(content, {name: form for name, form in forms.items() if name in content})
        if len(content["verifiers"]) + len(content.get("publishers", [])) > 2 * MAX_SIGNERS:
            raise ValueError(f"it names more than {2 * MAX_SIGNERS} signers")
        signers = {
            group: tuple(_parse_signer(entry, path.parent) for entry in content.get(group, []))
            for group in ("verifiers", "publishers")
        }
        trust_config = content.get("trust_config")
        return Policy(
            source=f"--policy {path}",
            threshold=content["threshold"],
            **signers,
            min_processor_families=content.get("min_processor_families", 1),
            max_age_days=content.get("max_age_days"),
            kinds=cast(tuple[Kind, ...], tuple(content.get("kinds", ("all",)))),
            trust_config=trust_config and path.parent / trust_config,
        )
    except ValueError as error:
        raise SettingsError(f"--policy {path} is malformed: {one_line(error)}") from error


def _check_names(entry: dict[Any, Any], known: set[str]) -> None:
    unknown = sorted(str(key)[:50] for key in entry if key not in known)
    if unknown:
        raise ValueError(f"{unknown[0]!a} is not a known key; the keys are {', '.join(sorted(known))}")


def _parse_signer(entry: dict[str, Any], folder: Path) -> Signer:
    if "public_key" in entry:
        _check_names(entry, {"name", "public_key"})
        files.check_form(entry, {"public_key": str})
        return Signer(entry["name"], load_key(folder / entry["public_key"]))
    _check_names(entry, {"name", "identity", "issuer"})
    files.check_form(entry, {"identity": str, "issuer": str})
    if not entry["identity"] or not entry["issuer"]:
        raise ValueError(f"{entry['name'][:50]!a} needs a public_key, or identity and issuer")
    return Signer(entry["name"], identity=entry["identity"], issuer=entry["issuer"])


def check_run(folder: Path, manifest: dict[str, Any], policy: Policy, now: datetime | None = None) -> Tally:
    """Check that a run was verified as a policy requires.

    Args:
        manifest: of the run, whose files match it.

    Raises:
        VerdictError: a verifier found the run DIFFERENT.
        ModelError: too few found it IDENTICAL; the message lists missing verifiers and ignored attestations.
    """
    digests = {WEIGHTS: manifest["files"].get(WEIGHTS, {}).get("sha256", "")}
    return _check(folder, Subject(str(folder), manifest["digest"], digests), policy, now)


def check_published(
    folder: Path, published: Published, policy: Policy, name: str = MODEL, now: datetime | None = None
) -> Tally:
    """Check that a published model's run was verified as a policy requires, and that the model comes from that run.

    The second is proved by a publisher's signature of the folder, or by verdicts that name the digest of the exported
    model.

    Args:
        published: content of the folder, to which the result applies.
        name: of the ONNX file that is to be used.

    Raises:
        VerdictError: a verifier found the run DIFFERENT.
        ModelError: too few found it IDENTICAL, or nothing proves that the model comes from it.
        SettingsError: Sigstore's keys cannot be loaded, or an extra is not installed.
    """
    digests = {}
    if not _is_by_publisher(folder, published, policy):
        if name != MODEL:
            reason = f"{name} must be signed by one of its publishers, as no attestation names it"
            raise ModelError(f"{folder} is not verified as {policy.source} requires: {reason}")
        digests = {EXPORT: hashlib.sha256(published.files[name]).hexdigest()}
    digest = str(published.manifest.get("run_manifest_digest", ""))
    return _check(folder, Subject(str(folder), digest, digests), policy, now)


def _is_by_publisher(folder: Path, published: Published, policy: Policy) -> bool:
    for signer in policy.publishers:
        try:
            if signer.key is not None:
                check_signature(folder, published, signer.key.path)
            else:
                check_identity_signature(folder, published, signer.identity, signer.issuer, policy.trust_config)
            return True
        except ModelError:  # not signed by this publisher
            continue
    return False


def _check(folder: Path, subject: Subject, policy: Policy, now: datetime | None) -> Tally:
    contents, refused = read_attestations(folder)
    tally = count(subject, contents, policy, now or datetime.now(UTC))
    tally.ignored.update(refused)
    families = {attestation.predicate["machine"]["processor_family"] for attestation in tally.counted}
    num_signers = len(policy.verifiers) - len(tally.missing)
    lacks = []
    if num_signers < policy.threshold:
        lacks.append(f"{num_signers} of {policy.threshold} verdicts; missing: {', '.join(tally.missing)}")
    if tally.counted and len(families) < policy.min_processor_families:
        named = ", ".join(sorted(families))
        lacks.append(f"{len(families)} of {policy.min_processor_families} processor families: {named}")
    if lacks:
        if not contents and not refused:
            lacks.append(
                f"{ATTESTATIONS}/ is missing or empty (a web server shows it only in its index pages); "
                "`verify --attest` signs a verdict"
            )
        others = [f"not counted: {line}" for line in tally.describe_ignored()]
        lacks += [list_first(others, _NUM_NAMED, "; ")] if others else []
        raise ModelError(f"{subject.title} is not verified as {policy.source} requires: {'; '.join(lacks)}")
    return tally


def count(subject: Subject, contents: dict[str, bytes], policy: Policy, now: datetime) -> Tally:
    """Count the attestations about a subject by a policy.

    Args:
        contents: attestations by file name.

    Raises:
        VerdictError: a verifier found the run DIFFERENT.
    """
    verifier = Verifier(policy.verifiers, policy.trust_config)
    counted: list[Attestation] = []
    different: list[Attestation] = []
    ignored: dict[str, str] = {}
    for name, content in contents.items():
        try:
            attestation = verifier.verify(name, content)
            if attestation.predicate["run"]["manifest_digest"] != subject.manifest_digest:
                raise ValueError("it is about another run")
            if attestation.predicate["verdict"] == "DIFFERENT":  # at any age
                different.append(attestation)
            else:
                _check_accepted(attestation, subject, policy, now)
                counted.append(attestation)
        except ValueError as error:
            ignored[name] = one_line(error)
    if different:
        words = "; ".join(each.describe() for each in [*different, *counted][: 2 * _NUM_NAMED])
        contradicting = "the verdicts contradict each other: " if counted else ""
        reason = f"{contradicting}{words}; resolve this before you rely on the run"
        raise VerdictError(f"{subject.title} is not verified as {policy.source} requires: {reason}")
    signers = {attestation.signer.id for attestation in counted}
    missing = tuple(signer.name for signer in policy.verifiers if signer.id not in signers)
    return Tally(tuple(counted), missing, ignored)


def _check_accepted(attestation: Attestation, subject: Subject, policy: Policy, now: datetime) -> None:
    for name, digest in subject.digests.items():
        if name not in attestation.subjects:
            raise ValueError(
                f"it does not name {name}, and no publisher of the policy signed the model; "
                "sign a verdict after publishing, or name who signs models under publishers"
            )
        if attestation.subjects[name] != digest:
            raise ValueError(f"it is about another {name}")
    verified_at, kind = attestation.verified_at, attestation.predicate["checked"]["kind"]
    if verified_at > now + CLOCK_SKEW:
        raise ValueError(f"it is dated in the future: {attestation.predicate['verified_at']}")
    if policy.max_age_days is not None and (now - verified_at).total_seconds() > policy.max_age_days * 86400:
        raise ValueError(f"it is older than {policy.max_age_days:g} days: {attestation.predicate['verified_at']}")
    if kind not in policy.kinds:
        raise ValueError(f"its kind is {kind}, but the policy accepts {', '.join(policy.kinds)}")
