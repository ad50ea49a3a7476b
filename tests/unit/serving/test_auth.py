"""Who is let in: by keys of which digests are kept, and by tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from image_classifier.errors import SettingsError
from image_classifier.serving import auth
from image_classifier.serving.auth import (
    KEYS_LIVE_S,
    MAX_KEYS_BYTES,
    Gate,
    KeyGate,
    TokenGate,
    build_gate,
    load_keys,
)
from image_classifier.serving.problems import Problem
from image_classifier.serving.settings import ServerSettings
from tests.issuer import AUDIENCE, ISSUER, Issuer, KeyServer, publishing, wait_for, write_certificate


def write_keys(path: Path, **keys: str) -> Path:
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in keys.items()]
    path.write_text("\n".join(["# who may ask", "", *lines]) + "\n")
    return path


def build_headers(credential: str, name: bytes = b"authorization") -> dict[bytes, bytes]:
    return {name: (f"Bearer {credential}" if name == b"authorization" else credential).encode()}


@pytest.fixture
def keys(tmp_path: Path) -> Gate:
    path = write_keys(tmp_path / "keys", alice="first", bob="second")
    return build_gate(ServerSettings(model="m", api_keys_file=path))


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counts(dict[tuple[str, bool], int]):
    """How often keys were read again, and with which result."""

    def __call__(self, option: str, is_done: bool) -> None:
        self[option, is_done] = self.get((option, is_done), 0) + 1


def knows(gate: Gate, credential: str) -> bool:
    """Say whether a gate lets somebody through."""
    try:
        return bool(gate.recognise(build_headers(credential)))
    except Problem:
        return False


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    return tmp_path / "jwks.json"


@pytest.fixture
def issuer(jwks: Path) -> Issuer:
    return Issuer(jwks)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(issuer: Issuer, jwks: Path, clock: Clock) -> TokenGate:
    return TokenGate(ISSUER, AUDIENCE, str(jwks), clock)


@pytest.fixture
def key_server(issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyServer]:
    certificate = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with publishing(certificate, issuer.document) as server:
        yield server


def test_without_settings_everybody_is_let_in() -> None:
    assert build_gate(ServerSettings(model="m")).recognise({}) == ""


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
def test_a_key_names_its_owner(keys: Gate, name: bytes) -> None:
    assert keys.recognise(build_headers("first", name)) == "alice"
    assert keys.recognise(build_headers("second", name)) == "bob"


@pytest.mark.parametrize("headers", [{}, build_headers(""), build_headers("third"), {b"authorization": b"Basic first"}])
def test_others_are_asked_for_a_key(keys: Gate, headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Problem) as caught:
        keys.recognise(headers)
    assert caught.value.status == 401
    assert (b"www-authenticate", b"Bearer") in caught.value.build_headers()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no key"),
        ("alice", "line 1"),
        ("alice:abc", "line 1"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}", "repeats the name alice"),
        (f"alice:{'G' * 64}", "hexadecimal"),
    ],
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(SettingsError, match=message) as caught:
        load_keys(tmp_path / "keys")
    assert "0000" not in str(caught.value)


def test_a_file_with_keys_is_read_up_to_a_limit(tmp_path: Path) -> None:
    with open(tmp_path / "keys", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(SettingsError, match="--api_keys_file: .* more than the 1,048,576 bytes"):
        load_keys(tmp_path / "keys")
    with pytest.raises(SettingsError, match="--api_keys_file: cannot read .*/none: No such file or directory$"):
        load_keys(tmp_path / "none")
    with pytest.raises(SettingsError, match="--jwt_jwks: .* more than the 1,048,576 bytes"):
        TokenGate(ISSUER, AUDIENCE, str(tmp_path / "keys"))


def test_a_token_of_the_issuer_names_its_subject(tokens: TokenGate, issuer: Issuer) -> None:
    token = issuer.sign()
    assert tokens.recognise(build_headers(token)) == "carol"
    assert tokens.recognise(build_headers(token)) == "carol"  # the second time by memory


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other.example"},
        {"aud": "other"},
        {"exp": 1.0},
        {"exp": None},
        {"aud": None},
        {"nbf": time.time() + 3600},
    ],
)
def test_other_tokens_are_refused(tokens: TokenGate, issuer: Issuer, changes: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        tokens.recognise(build_headers(issuer.sign(**changes)))
    assert caught.value.status == 401


def test_a_token_that_ends_is_not_remembered_beyond(tokens: TokenGate, issuer: Issuer) -> None:
    token = issuer.sign(exp=int(time.time()) - 3)  # within the leeway now, outside of it soon
    assert tokens.recognise(build_headers(token)) == "carol"
    deadline = time.monotonic() + 5
    with pytest.raises(Problem):
        while time.monotonic() < deadline:
            tokens.recognise(build_headers(token))
            time.sleep(0.05)


def test_forged_tokens_are_refused(tokens: TokenGate, issuer: Issuer, tmp_path: Path) -> None:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "mallory", "exp": time.time() + 60}
    public = issuer.document
    forged = [
        Issuer(tmp_path / "other.json").sign(),  # another key under the same name
        jwt.encode(claims, None, algorithm="none", headers={"kid": "1"}),  # type: ignore[arg-type]  # no key
        jwt.encode(claims, hashlib.sha256(public.encode()).hexdigest(), algorithm="HS256", headers={"kid": "1"}),
        "a.b.c",
        "\x00",
    ]
    for token in forged:
        with pytest.raises(Problem):
            tokens.recognise(build_headers(token))


def test_a_new_key_of_the_issuer_is_fetched(tokens: TokenGate, issuer: Issuer, jwks: Path, clock: Clock) -> None:
    renewed = Issuer(jwks, "2")
    assert not knows(tokens, renewed.sign())
    clock.now += 11
    wait_for(lambda: knows(tokens, renewed.sign()))
    assert not knows(tokens, issuer.sign())


def test_an_issuers_keys_are_due_again_sooner_than_they_end(tokens: TokenGate, tmp_path: Path) -> None:
    keys = KeyGate(write_keys(tmp_path / "keys", alice="first"))
    assert keys.refresh_s == Gate().refresh_s == float("inf")
    assert Gate(keys, tokens).refresh_s == tokens.refresh_s < KEYS_LIVE_S


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"keys": [{"kty": "EC"}]}'])
def test_a_file_without_public_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "jwks.json").write_text(content)
    with pytest.raises(SettingsError, match="--jwt_jwks"):
        TokenGate(ISSUER, AUDIENCE, str(tmp_path / "jwks.json"))


@pytest.mark.parametrize("changes", [{"use": "enc"}, {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}])
def test_keys_for_something_else_verify_nothing(tmp_path: Path, issuer: Issuer, changes: dict[str, str]) -> None:
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [issuer.jwk | changes]}))
    with pytest.raises(SettingsError, match="no public key that can verify signatures"):
        TokenGate(ISSUER, AUDIENCE, str(tmp_path / "jwks.json"))


def test_keys_and_tokens_go_together(tmp_path: Path, issuer: Issuer, jwks: Path) -> None:
    path = write_keys(tmp_path / "keys", alice="first")
    gate = build_gate(
        ServerSettings(model="m", api_keys_file=path, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=str(jwks))
    )
    assert gate.recognise(build_headers("first")) == "alice"
    assert gate.recognise(build_headers(issuer.sign())) == "carol"
    with pytest.raises(Problem):
        gate.recognise(build_headers("neither"))


def test_both_are_read_again(tmp_path: Path, issuer: Issuer, jwks: Path) -> None:
    path = write_keys(tmp_path / "keys", alice="first")
    settings = ServerSettings(
        model="m", api_keys_file=path, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=str(jwks)
    )
    counts = Counts()
    gate = build_gate(settings, counts)
    write_keys(path, alice="third")
    renewed = Issuer(jwks, "2")
    gate.refresh()
    assert knows(gate, "third") and not knows(gate, "first")
    wait_for(lambda: knows(gate, renewed.sign()))
    wait_for(lambda: counts == {("api_keys_file", True): 1, ("jwt_jwks", True): 1})


def test_keys_that_were_added_or_removed_are_known_when_they_are_read_again(keys: Gate, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", bob="second", dora="fourth")
    assert knows(keys, "first") and not knows(keys, "fourth")
    keys.refresh()
    assert not knows(keys, "first") and knows(keys, "second") and knows(keys, "fourth")


@pytest.mark.parametrize("content", ["", "# nobody\n", "alice:abc\n", "bob:" + 63 * "0", "\x00", None])
def test_a_file_that_is_half_written_locks_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    path, counts = write_keys(tmp_path / "keys", alice="first", bob="second"), Counts()
    keys = KeyGate(path, counts)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    keys.refresh()
    assert knows(keys, "first") and knows(keys, "second")
    assert counts == {("api_keys_file", False): 1}
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "stay valid" in record.getMessage()
    write_keys(path, bob="second")
    keys.refresh()
    assert not knows(keys, "first") and counts[("api_keys_file", True)] == 1


def test_keys_come_from_an_https_address(key_server: KeyServer, issuer: Issuer) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url)
    assert gate.recognise(build_headers(issuer.sign())) == "carol"
    assert key_server.asked == ["/jwks.json"]


def test_a_certificate_that_nobody_vouches_for_is_refused(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SettingsError, match="--jwt_jwks: .*certificate"):
        TokenGate(ISSUER, AUDIENCE, key_server.url)
    assert key_server.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "https", "file"])
def test_a_redirect_is_not_followed(key_server: KeyServer, jwks: Path, status: int, scheme: str) -> None:
    key_server.status = status
    key_server.location = f"file://{jwks}" if scheme == "file" else key_server.url.replace("https", scheme) + "2"
    with pytest.raises(SettingsError, match=f"the request redirects, which is not allowed .status {status}"):
        TokenGate(ISSUER, AUDIENCE, key_server.url)
    assert key_server.asked == ["/jwks.json"]


def test_an_answer_is_read_up_to_a_limit_and_for_a_time(
    key_server: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_server.content = issuer.document + MAX_KEYS_BYTES * " "
    with pytest.raises(SettingsError, match="more than the 1,048,576 bytes"):
        TokenGate(ISSUER, AUDIENCE, key_server.url)
    key_server.content = issuer.document
    key_server.part_s = 0.02
    monkeypatch.setattr(auth, "FETCH_S", 0.1)
    with pytest.raises(SettingsError, match="takes longer than 0.1 s"):
        TokenGate(ISSUER, AUDIENCE, key_server.url)


def test_a_flood_of_unknown_keys_makes_one_request(key_server: KeyServer, issuer: Issuer, clock: Clock) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url, clock)
    strangers = [issuer.sign({"kid": f"{number}"}) for number in range(2, 100)]
    for number in (1, 2, 3):
        assert not any(knows(gate, token) for token in strangers)
        assert len(key_server.asked) == number
        clock.now += 10.1
        assert not any(knows(gate, token) for token in strangers)
        wait_for(lambda wanted=number + 1: len(key_server.asked) == wanted)  # type: ignore[misc]
        wait_for(lambda: not gate._is_refreshing)


def test_a_name_that_is_no_text_is_made_one(key_server: KeyServer, issuer: Issuer) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url)
    headers = {b"authorization": b"Bearer " + issuer.sign(sub="eve \ud800").encode()}
    assert gate.recognise(headers) == "eve ?"


def test_nobody_waits_for_the_network(key_server: KeyServer, issuer: Issuer, clock: Clock) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url, clock)
    key_server.is_open.clear()
    clock.now += 11
    assert not knows(gate, issuer.sign({"kid": "2"}))
    assert knows(gate, issuer.sign())  # while the keys are being fetched
    gate.refresh()
    gate.refresh()
    wait_for(lambda: len(key_server.asked) == 2)
    assert knows(gate, issuer.sign(sub="dora"))
    key_server.is_open.set()
    wait_for(lambda: len(key_server.asked) == 3)  # once more for what was asked meanwhile, and not twice
    wait_for(lambda: not gate._is_refreshing)
    assert len(key_server.asked) == 3


def test_a_withdrawn_key_takes_its_tokens_along(key_server: KeyServer, issuer: Issuer) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url)
    before, during = issuer.sign(sub="before"), issuer.sign(sub="during")
    assert knows(gate, before)
    key_server.is_open.clear()
    key_server.content = Issuer(key_id="2").document
    gate.refresh()
    wait_for(lambda: len(key_server.asked) == 2)
    assert knows(gate, during)
    key_server.is_open.set()
    wait_for(lambda: not knows(gate, before))
    assert not knows(gate, during) and not knows(gate, issuer.sign(sub="after"))


def test_the_keys_live_for_an_hour_without_their_issuer(
    key_server: KeyServer, issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Counts()
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url, clock, counts)
    token = issuer.sign()
    key_server.status = 500
    clock.now += KEYS_LIVE_S - 100
    gate.refresh()
    wait_for(lambda: counts == {("jwt_jwks", False): 1})
    assert "stay valid for 100 s: the request failed (status 500)" in caplog.text
    assert knows(gate, token)
    clock.now += 101
    assert not knows(gate, token)
    wait_for(lambda: not gate._is_refreshing)
    key_server.status = 200
    assert not knows(gate, token)  # nor is the issuer asked at each request
    clock.now += 11
    wait_for(lambda: knows(gate, token))
    wait_for(lambda: counts == {("jwt_jwks", False): 2, ("jwt_jwks", True): 1})


def test_no_address_that_a_token_names_is_asked(key_server: KeyServer, issuer: Issuer, clock: Clock) -> None:
    gate = TokenGate(ISSUER, AUDIENCE, key_server.url, clock)
    clock.now += 60
    other = key_server.url.replace("jwks.json", "other")
    for name in ("kid", "jku", "x5u"):
        forger = Issuer()
        header = {name: other} | ({"jwk": forger.jwk} if name == "jku" else {})
        assert not knows(gate, forger.sign(header))
        assert knows(gate, issuer.sign({name: other})) == (name != "kid")
    wait_for(lambda: not gate._is_refreshing)
    assert set(key_server.asked) == {"/jwks.json"}
    assert os.environ["SSL_CERT_FILE"]  # so that it would have been reached
