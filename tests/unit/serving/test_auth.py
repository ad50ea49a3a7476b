"""Who is let in: by keys of which digests are kept, and by tokens."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from image_classifier.errors import SettingsError
from image_classifier.serving.auth import Gate, TokenGate, build_gate, load_keys
from image_classifier.serving.problems import Problem
from image_classifier.serving.settings import ServerSettings

ISSUER, AUDIENCE = "https://issuer.example", "classifier"


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


class Issuer:
    """Signs tokens, and publishes the public half of its key."""

    def __init__(self, path: Path, key_id: str = "1") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.key_id = key_id
        self.path = path
        document = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        path.write_text(json.dumps({"keys": [document | {"kid": key_id, "alg": "ES256"}]}))

    def sign(self, **changes: Any) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "carol", "exp": time.time() + 60} | changes
        present = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(present, self.key, algorithm="ES256", headers={"kid": self.key_id})


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "jwks.json")


@pytest.fixture
def tokens(issuer: Issuer) -> TokenGate:
    return TokenGate(ISSUER, AUDIENCE, str(issuer.path))


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
        ("", "holds no key"),
        ("alice", "line 1"),
        ("alice:abc", "line 1"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}", "a second time"),
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
    public = issuer.path.read_text()
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


def test_a_new_key_of_the_issuer_is_fetched(tokens: TokenGate, issuer: Issuer) -> None:
    renewed = Issuer(issuer.path, "2")
    tokens._loaded_at -= 60
    deadline = time.monotonic() + 10
    while True:
        try:
            assert tokens.recognise(build_headers(renewed.sign())) == "carol"
            break
        except Problem:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with pytest.raises(Problem):
        tokens.recognise(build_headers(issuer.sign()))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"keys": [{"kty": "EC"}]}'])
def test_a_file_without_public_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "jwks.json").write_text(content)
    with pytest.raises(SettingsError, match="--jwt_jwks"):
        TokenGate(ISSUER, AUDIENCE, str(tmp_path / "jwks.json"))


def test_keys_and_tokens_go_together(tmp_path: Path, issuer: Issuer) -> None:
    path = write_keys(tmp_path / "keys", alice="first")
    gate = build_gate(
        ServerSettings(
            model="m", api_keys_file=path, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks=str(issuer.path)
        )
    )
    assert gate.recognise(build_headers("first")) == "alice"
    assert gate.recognise(build_headers(issuer.sign())) == "carol"
    with pytest.raises(Problem):
        gate.recognise(build_headers("neither"))
