"""Verdicts of others: who counts is counted once, and nothing else is, whatever lies in the folder."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import ImageClassifierError, ModelError, SettingsError, VerdictError
from image_classifier.published import attestation as attestations
from image_classifier.published.attestation import Signer, Verifier, parse_statement, serialize_statement
from image_classifier.published.folder import (
    ATTESTATIONS,
    MANIFEST,
    MODEL,
    describe_content,
    read_published,
    serialize_manifest,
)
from image_classifier.published.policy import (
    Policy,
    Tally,
    build_policy,
    check_published,
    check_run,
    load_policy,
    parse_policy,
    parse_threshold,
)
from image_classifier.published.predictor import load_predictor
from image_classifier.publishing.signing import build_signer
from image_classifier.tracking.reading import read_manifest
from image_classifier.verification import Verdict
from tests.attestations import NOW, put, sign, state, write_policy
from tests.conftest import PROJECT
from tests.mutate import change_bytes, change_json
from tests.published import write_keys, write_published
from tests.runs import write_run
from tests.sigstore import GITHUB_ISSUER, Sigstore

IDENTITY = "https://github.com/somebody/image-classifier/.github/workflows/training.yaml@refs/heads/main"
CURVES = {"build": ec.SECP256R1(), "lab": ec.SECP384R1(), "desk": ec.SECP521R1(), "stranger": ec.SECP256R1()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A private and a public key of each curve, and a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_keys(folder, name, curve) for name, curve in CURVES.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "experiments")


@pytest.fixture
def policy(keys: dict[str, tuple[Path, Path]]) -> Policy:
    """Two of three."""
    return build_policy(2, [keys[name][1] for name in ("build", "lab", "desk")])


def check(run: Path, policy: Policy) -> Tally:
    return check_run(run, read_manifest(run), policy, NOW)


def test_two_of_three_are_enough_and_the_third_is_missing(
    run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    with pytest.raises(
        ModelError, match=r"0 of 2 .*; attestations/ is missing or empty \(a web server shows it only in"
    ):
        check(run, policy)
    put(run, sign(state(run), keys["build"][0]))
    with pytest.raises(ModelError, match=r"1 of 2 verdicts; missing: \S+lab.pub, \S+desk.pub$"):
        check(run, policy)
    put(run, sign(state(run), keys["lab"][0]))
    tally = check(run, policy)
    assert [str(name) for name in tally.missing] == [str(keys["desk"][1])] and not tally.ignored
    assert tally.counted[0].describe().endswith("IDENTICAL, all 300 steps, on x86_64 GenuineIntel 6, 2026-06-01")


Change = Callable[[dict[str, Any]], Any]


def set_in(*path: str, value: Any) -> Change:
    def change(statement: dict[str, Any]) -> None:
        inner: Any = statement
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value

    return change


BAD_STATEMENTS: dict[str, tuple[Change, str]] = {
    "another run": (set_in("predicate", "run", "manifest_digest", value="0" * 64), "it is about another run"),
    "other weights": (set_in("subject", value=[]), "its subjects are not"),
    "other bytes": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "it is about another model.pth"),
    "a later version": (set_in("predicate", "format_version", value=2), "it has the format 2"),
    "another predicate": (
        set_in("predicateType", value="https://slsa.dev/provenance/v1"),
        "not a verdict of this package",
    ),
    "the future": (set_in("predicate", "verified_at", value="2026-06-01T12:06:00Z"), "it is dated in the future"),
    "another time": (set_in("predicate", "verified_at", value="2026-06-01T12:00:00+00:00"), "its verified_at is"),
    "no time": (set_in("predicate", "verified_at", value="2026-13-01T12:00:00Z"), "month must be in"),
    "a segment": (
        lambda s: s["predicate"]["checked"].update(kind="segment", segments=[[1, 2]]),
        "its kind is segment, but the policy accepts all",
    ),
    "all of some": (set_in("predicate", "checked", "segments", value=[[1, 2]]), "not segments of the run"),
    "another verdict": (set_in("predicate", "verdict", value="INTACT"), "its verdict is 'INTACT'"),
    "no verdict": (lambda s: s["predicate"].pop("verdict"), "predicate has no verdict"),
    "a digest that is none": (lambda s: s["subject"][0]["digest"].update(sha256="A" * 64), "an invalid sha256"),
}


@pytest.mark.parametrize("case", BAD_STATEMENTS)
def test_a_signed_statement_that_proves_nothing_does_not_count(
    case: str, run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    change, reason = BAD_STATEMENTS[case]
    put(run, sign(state(run), keys["build"][0]))
    statement = state(run)
    change(statement)
    path = put(run, sign(statement, keys["lab"][0]))
    with pytest.raises(ModelError, match="1 of 2 verdicts") as caught:
        check(run, policy)
    assert f"not counted: {path.name}: " in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_count_is_described_once_for_each_reason() -> None:
    ignored = {f"{number}.json": "it is about another run" for number in range(7)} | {"9.json": "it names no key"}
    assert Tally((), (), ignored).describe_ignored() == [
        "0.json, 1.json, 2.json, 3.json, 4.json and 2 more: it is about another run",
        "9.json: it names no key",
    ]


def change_envelope(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    envelope = json.loads(content)
    change(envelope)
    return (json.dumps(envelope, indent=2) + "\n").encode()


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "unsigned": (lambda c: change_envelope(c, lambda e: e["signatures"].clear()), "0 signatures instead of one"),
    "the statement itself": (lambda c: base64.b64decode(json.loads(c)["payload"]), "it has no payload"),
    "two keys in one file": (
        lambda c: change_envelope(c, lambda e: e["signatures"].append(e["signatures"][0])),
        "2 signatures instead of one",
    ),
    "no key named": (lambda c: change_envelope(c, lambda e: e["signatures"][0].update(keyid="")), "it names no key"),
    "an unknown key named": (
        lambda c: change_envelope(c, lambda e: e["signatures"][0].update(keyid="0" * 64)),
        "by none of the verifiers",
    ),
    "another payload type": (lambda c: change_envelope(c, lambda e: e.update(payloadType="text/plain")), "payloadType"),
    "more in it": (lambda c: change_envelope(c, lambda e: e.update(more=1)), "its encoding is not canonical"),
    "a key twice": (
        lambda c: c.replace(b'"payloadType"', b'"payload": "", "payloadType"', 1),
        "the key 'payload' twice",
    ),
    "URL-safe base64": (
        lambda c: change_envelope(c, lambda e: e.update(payload="-_" + e["payload"])),
        "it has invalid base64",
    ),
    "base64 with a line break": (
        lambda c: change_envelope(c, lambda e: e.update(payload=e["payload"][:8] + "\n" + e["payload"][8:])),
        "it has invalid base64",
    ),
    "base64 with loose bits": (
        lambda c: change_envelope(c, lambda e: e["signatures"][0].update(sig="QR==")),
        "its encoding is not canonical",
    ),
    "other spaces": (lambda c: json.dumps(json.loads(c)).encode(), "its encoding is not canonical"),
    "oversized": (lambda c: c + b" " * attestations.MAX_BYTES, "more than the 262,144 bytes"),
    "nested": (lambda c: b"[" * 5000 + b"]" * 5000, "nested deeper"),
    "empty": (lambda c: b"", "Expecting value"),
    "an identity's": (
        lambda c: b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
        "but the policy has none",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_attestation_does_not_count(
    case: str, run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    change, reason = BAD_FILES[case]
    put(run, sign(state(run), keys["build"][0]))
    put(run, change(sign(state(run), keys["lab"][0])))
    with pytest.raises(ModelError, match="1 of 2 verdicts") as caught:
        check(run, policy)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_stranger_and_one_key_in_two_files_do_not_count(
    run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    put(run, sign(state(run), keys["build"][0]))
    put(run, sign(state(run, at=NOW - timedelta(days=1)), keys["build"][0]))
    put(run, sign(state(run), keys["stranger"][0]))
    as_lab = json.loads(sign(state(run), keys["stranger"][0]))
    as_lab["signatures"][0]["keyid"] = policy.verifiers[1].id[0]
    put(run, (json.dumps(as_lab, indent=2) + "\n").encode())
    with pytest.raises(ModelError, match="1 of 2 verdicts") as caught:
        check(run, policy)
    assert "signed by none of the verifiers" in str(caught.value) and "its signature does not match the key of" in str(
        caught.value
    )


def test_an_attestation_of_another_model_is_not_replayed(
    run: Path, tmp_path: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    other = write_run(tmp_path / "experiments", "experiment/other", seed=1)
    for name in ("build", "lab"):
        put(other, sign(state(other), keys[name][0]))
    check(other, policy)
    shutil.copytree(other / ATTESTATIONS, run / ATTESTATIONS)
    with pytest.raises(ModelError, match="0 of 2 verdicts; .*it is about another run"):
        check(run, policy)


def test_links_and_what_is_no_file_are_not_followed(
    run: Path, tmp_path: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    for name in ("build", "lab"):
        put(run, sign(state(run), keys[name][0]))
    moved = (run / ATTESTATIONS).rename(tmp_path / "elsewhere")
    (run / ATTESTATIONS).symlink_to(moved)
    with pytest.raises(ModelError, match="attestations is not a folder"):
        check(run, policy)
    (run / ATTESTATIONS).unlink()
    (run / ATTESTATIONS).mkdir()
    for path in moved.iterdir():
        (run / ATTESTATIONS / path.name).symlink_to(path)
    (run / ATTESTATIONS / "folder").mkdir()
    with pytest.raises(ModelError, match="symbolic link, which is not followed"):
        check(run, policy)
    for number in range(attestations.MAX_FILES):
        (run / ATTESTATIONS / f"{number}").touch()
    with pytest.raises(ModelError, match="more than the 256 files"):
        check(run, policy)


def test_a_verdict_that_contradicts_closes_the_gate_and_both_are_shown(
    run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    for name in ("build", "lab"):
        put(run, sign(state(run), keys[name][0]))
    late = sign(state(run, verdict=Verdict.DIFFERENT, at=NOW - timedelta(days=9999)), keys["desk"][0])
    put(run, sign(state(run, verdict=Verdict.DIFFERENT), keys["stranger"][0]))
    check(run, policy)  # a stranger can close nothing
    put(run, late)
    with pytest.raises(VerdictError, match="contradict each other: .*desk.*DIFFERENT, the first .*build.*IDENTICAL"):
        check(run, policy)
    for path in (run / ATTESTATIONS).iterdir():
        if path.read_bytes() != late:
            path.unlink()
    with pytest.raises(VerdictError, match=r"requires: \S+desk.pub: DIFFERENT"):
        check(run, policy)


def test_a_policy_asks_for_families_age_and_kinds(
    run: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    public = {name: keys[name][1] for name in ("build", "lab")}
    put(run, sign(state(run, at=NOW - timedelta(days=40)), keys["build"][0]))
    put(run, sign(state(run, kind="sample", family="aarch64 0x41"), keys["lab"][0]))
    check(run, load_policy(write_policy(tmp_path / "p", public, kinds=["all", "sample"], min_processor_families=2)))
    cases: dict[str, dict[str, Any]] = {
        "it is older than 30 days: 2026-04-22T12:00:00Z": {"kinds": ["all", "sample"], "max_age_days": 30},
        "its kind is sample, but the policy accepts all": {},
        "2 of 3 processor families: aarch64 0x41, x86_64 GenuineIntel 6": {
            "kinds": ["sample", "all"],
            "min_processor_families": 3,
        },
    }
    for reason, values in cases.items():
        with pytest.raises(ModelError) as caught:
            check(run, load_policy(write_policy(tmp_path / "p", public, **values)))
        assert reason in str(caught.value)


BAD_POLICIES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"format_version": 2}, "it has the format 2"),
    "unknown": ({"max_age": 3}, "'max_age' is not a known key"),
    "nobody": ({"verifiers": [], "threshold": 0}, "it asks for 0 of its 0 verifiers"),
    "too many": ({"threshold": 3}, "it asks for 3 of its 2 verifiers"),
    "a text": ({"threshold": "2"}, "threshold is a string"),
    "true": ({"threshold": True}, "threshold is true or false"),
    "age": ({"max_age_days": 0}, "max_age_days is 0"),
    "kinds": ({"kinds": ["files"]}, "kinds takes one or more of all, sample, segment"),
    "no kinds": ({"kinds": []}, "kinds takes one or more of"),
    "families": ({"min_processor_families": 0}, "min_processor_families is 0"),
    "identity": ({"verifiers": [{"name": "a", "identity": "b"}]}, "it has no issuer"),
    "empty identity": ({"verifiers": [{"name": "a", "identity": "", "issuer": "c"}]}, "needs a public_key"),
    "both": ({"verifiers": [{"name": "a", "public_key": "b", "issuer": "c"}]}, "'issuer' is not a known key"),
    "missing key": ({"verifiers": [{"name": "a", "public_key": "none"}]}, "No such file"),
    "many": ({"verifiers": [{"name": "a", "public_key": "none"}] * 200}, "more than 128 signers"),
}


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_policy_that_is_malformed_or_cannot_be_met_is_refused(
    case: str, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    values, reason = BAD_POLICIES[case]
    path = write_policy(tmp_path / "policy.yaml", {name: keys[name][1] for name in ("build", "lab")}, **values)
    with pytest.raises(SettingsError) as caught:
        load_policy(path)
    assert reason in str(caught.value) and "policy.yaml" in str(caught.value) or case == "missing key"


def test_the_policy_of_the_document_is_one(tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    document = (PROJECT / "docs" / "proofs.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.+?)```", document, flags=re.DOTALL)
    (tmp_path / "keys").mkdir()
    for name, (_, public) in zip(("lab", "desk", "release"), keys.values(), strict=False):
        shutil.copy(public, tmp_path / "keys" / f"{name}.pub")
    (tmp_path / "policy.yaml").write_text(text)
    policy = load_policy(tmp_path / "policy.yaml")
    assert [signer.name for signer in policy.verifiers] == ["lab", "desk", "workflow"]
    assert (policy.threshold, policy.kinds, policy.trust_config) == (2, ("all", "sample"), tmp_path / "trust.json")


def test_a_key_twice_is_refused(tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    copy = Path(shutil.copy(keys["build"][1], tmp_path / "copy.pub"))
    with pytest.raises(SettingsError, match="is twice among its verifiers"):
        build_policy(2, [keys["build"][1], copy])
    both = tmp_path / "both.pub"
    both.write_bytes(keys["build"][1].read_bytes() + keys["lab"][1].read_bytes())
    for path, reason in (
        (both, "more than one key"),
        (keys["build"][0], "no BEGIN PUBLIC KEY"),
        (write_keys(tmp_path, "rsa")[1], "not on the curve"),
        (write_keys(tmp_path, "other", ec.SECP256K1())[1], "not on the curve"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(SettingsError, match=f"is not a usable public key: .*{reason}|No such file"):
            build_policy(1, [path])


@pytest.mark.parametrize("text", ["", "2", "0-of-3", "3-of-2", "2-OF-3", "2-of-3 ", "²-of-3", "100-of-100", "-1-of-2"])
def test_a_threshold_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="such as 2-of-3"):
        parse_threshold(text)


def test_other_verifiers_and_the_schema_read_what_is_signed(run: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    schema = json.loads(Path(attestations.__file__).with_name("verdict.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in ("build", "lab", "desk"):
        content = sign(state(run), keys[name][0])
        key = attestations.load_key(keys[name][1])
        envelope = Envelope.from_dict(json.loads(content))
        assert envelope.verify([SSlibKey.from_crypto(key.public, keyid=key.id)], 1)
        statement = json.loads(envelope.payload)
        Statement.copy_from_pb(json_format.Parse(envelope.payload, statement_pb2.Statement())).validate()
        jsonschema.validate(statement, schema)
        assert parse_statement(envelope.payload) == statement == state(run)
    for change, _ in (
        BAD_STATEMENTS[case] for case in ("a later version", "no verdict", "another verdict", "another time")
    ):
        statement = state(run)
        change(statement)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(statement, schema)


def test_an_identity_counts_as_sigstore_vouches_for_it(run: Path, tmp_path: Path) -> None:
    sigstore = Sigstore()
    config = sigstore.write_trust_config(tmp_path / "trust.json")
    entry = {"name": "workflow", "identity": IDENTITY, "issuer": GITHUB_ISSUER}
    path = write_policy(tmp_path / "policy.yaml", {}, threshold=1, verifiers=[entry], trust_config=config.name)
    put(run, sigstore.sign_statement(serialize_statement(state(run)), IDENTITY))
    assert [each.signer.name for each in check(run, load_policy(path)).counted] == ["workflow"]
    others = [{**entry, "name": name, "identity": name} for name in ("first", "second")]
    several = write_policy(tmp_path / "several", {}, threshold=1, verifiers=[*others, entry], trust_config=config.name)
    assert [each.signer.name for each in check(run, load_policy(several)).counted] == ["workflow"]
    for identity, issuer, by in (
        (IDENTITY.replace("main", "other"), GITHUB_ISSUER, sigstore),
        (IDENTITY, "https://accounts.test", sigstore),
        (IDENTITY, GITHUB_ISSUER, Sigstore()),
    ):
        shutil.rmtree(run / ATTESTATIONS)
        put(run, by.sign_statement(serialize_statement(state(run)), identity, issuer=issuer))
        with pytest.raises(ModelError, match="0 of 1 verdicts; .*it is signed by none of the identities"):
            check(run, load_policy(path))
    config.write_text("noise")
    with pytest.raises(SettingsError, match="Sigstore's keys cannot be loaded from"):
        check(run, load_policy(path))


def test_mutated_attestations_are_never_accepted_and_crash_nothing(
    run: Path, policy: Policy, keys: dict[str, tuple[Path, Path]]
) -> None:
    chance = random.Random(0)
    verifier = Verifier(policy.verifiers)
    statement, private = state(run), keys["build"][0]
    content = sign(statement, private)
    payload, envelope = serialize_statement(statement), json.loads(content)
    num_refused = 0
    for number in range(7000):
        if number % 2:
            changed = change_bytes(chance, content)
        else:  # the statement is changed, and the signature over it stays
            forged = change_bytes(chance, payload)
            changed = json.dumps({**envelope, "payload": base64.b64encode(forged).decode()}, indent=2).encode() + b"\n"
        if changed == content:
            continue
        with pytest.raises(ValueError):
            verifier.verify("name", changed)
        num_refused += 1
    assert num_refused > 6000


def test_mutated_bundles_are_refused_or_say_what_was_signed(run: Path, tmp_path: Path) -> None:
    """What no signature is over may change, such as spaces: the statement may not."""
    chance, sigstore, statement = random.Random(3), Sigstore(), state(run)
    content = sigstore.sign_statement(serialize_statement(statement), IDENTITY)
    signer = Signer("workflow", identity=IDENTITY, issuer=GITHUB_ISSUER)
    verifier = Verifier((signer,), sigstore.write_trust_config(tmp_path / "trust.json"))
    assert verifier.verify("name", content).statement == statement
    num_refused = 0
    for number in range(400):
        changed = change_json(chance, content) if number % 2 else change_bytes(chance, content)
        try:
            assert verifier.verify("name", changed).statement == statement
        except ValueError:
            num_refused += 1
    assert num_refused > 200


def test_mutated_statements_that_are_signed_say_nothing_of_another_run_and_crash_nothing(run: Path) -> None:
    """As by a verifier whose program is another's: each is refused, or is a whole verdict."""
    chance = random.Random(1)
    payload = serialize_statement(state(run))
    schema = json.loads(Path(attestations.__file__).with_name("verdict.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    num_refused = 0
    for number in range(2000):
        changed = change_json(chance, payload) if number % 2 else change_bytes(chance, payload)
        try:
            statement = parse_statement(changed)
        except ValueError:
            num_refused += 1
            continue
        assert not [error.message for error in validator.iter_errors(statement)]
    assert num_refused > 500


def test_mutated_policies_are_refused_or_whole(tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    chance = random.Random(2)
    path = write_policy(
        tmp_path / "policy.yaml",
        {name: keys[name][1] for name in ("build", "lab")},
        **{"min_processor_families": 2, "max_age_days": 365, "kinds": ["all"]},
    )
    content, num_refused = path.read_bytes(), 0
    for number in range(1000):
        changed = change_json(chance, content) if number % 2 else change_bytes(chance, content)
        path.write_bytes(changed)
        try:
            policy = load_policy(path)
        except SettingsError:
            num_refused += 1
            continue
        assert 1 <= policy.threshold <= len({signer.id for signer in policy.verifiers})
    assert num_refused > 400


@pytest.fixture
def published(run: Path, published_run: Path, sample_dataset: Path) -> Path:
    """A published model that says that it is of the run."""
    changes = {"run_manifest_digest": read_manifest(run)["digest"]}
    return write_published(run / "published", published_run, load_snapshot(sample_dataset), 50, **changes)


def test_a_published_model_counts_if_verifiers_name_its_bytes_or_a_publisher_has_signed_it(
    run: Path, published: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    public = {name: keys[name][1] for name in ("build", "lab")}
    usual = load_policy(write_policy(tmp_path / "usual", public))
    entry = [{"name": "publisher", "public_key": str(keys["desk"][1])}]
    with_publisher = load_policy(write_policy(tmp_path / "publisher", public, publishers=entry))

    def load(policy: Policy) -> str:
        check_published(published, read_published(published), policy, now=NOW)
        return load_predictor(published, policy=policy).model.run_name

    for name in ("build", "lab"):
        put(published, sign(state(run), keys[name][0]))
    for policy in (usual, with_publisher):
        with pytest.raises(ModelError, match="it does not name published/model.onnx, and no publisher"):
            load(policy)
    build_signer(str(keys["stranger"][0]))(published)
    with pytest.raises(ModelError, match="it does not name published/model.onnx"):
        load(with_publisher)
    shutil.rmtree(published / ATTESTATIONS)  # else they would be signed
    build_signer(str(keys["desk"][0]))(published)
    for name in ("build", "lab"):
        put(published, sign(state(run), keys[name][0]))
    assert load(with_publisher) == "run"
    with pytest.raises(ModelError, match="it does not name published/model.onnx"):
        load(usual)
    for name in ("build", "lab"):
        put(published, sign(state(run, export=(published / MODEL).read_bytes()), keys[name][0]))
    assert load(usual) == "run"


def test_a_model_that_claims_to_be_of_a_verified_run_is_refused(
    run: Path, published: Path, tmp_path: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    policy = load_policy(write_policy(tmp_path / "policy", {"build": keys["build"][1]}))
    put(published, sign(state(run, export=(published / MODEL).read_bytes()), keys["build"][0]))
    check_published(published, read_published(published), policy, now=NOW)
    original = (published / MANIFEST).read_bytes()
    manifest = json.loads(original) | {"run_manifest_digest": "0" * 64}
    (published / MANIFEST).write_bytes(serialize_manifest(manifest))
    with pytest.raises(ModelError, match="it is about another run"):
        check_published(published, read_published(published), policy, now=NOW)
    content = (published / MODEL).read_bytes() + b"\x72\x00"  # of an ONNX file: an empty text more
    manifest = json.loads(original)
    manifest["files"][MODEL] = describe_content(content)
    (published / MODEL).write_bytes(content)
    (published / MANIFEST).write_bytes(serialize_manifest(manifest))
    with pytest.raises(ModelError, match="it is about another published/model.onnx"):
        check_published(published, read_published(published), policy, now=NOW)
    with pytest.raises(ImageClassifierError, match="model.int8.onnx must be signed by one of its publishers"):
        check_published(published, read_published(published), policy, "model.int8.onnx", now=NOW)


def test_a_parsed_policy_is_the_one_that_was_written(tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    entry = {"name": "a", "public_key": str(keys["build"][1])}
    policy = parse_policy({"format_version": 1, "threshold": 1, "verifiers": [entry]}, tmp_path / "policy")
    assert (policy.threshold, policy.kinds, policy.publishers) == (1, ("all",), ())
