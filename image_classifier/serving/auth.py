"""Who may ask: API keys of which only digests are kept, or JSON web tokens of one issuer."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt

from image_classifier.errors import SettingsError
from image_classifier.files import parse_json, read_file
from image_classifier.serving.problems import Problem
from image_classifier.serving.settings import ServerSettings

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Those with a public key; `none` and those with a shared secret are refused."""

MAX_KEYS_BYTES = 2**20
MAX_TOKENS = 1024
REFRESH_S = 300.0
REFRESH_AT_MOST_EVERY_S = 10.0
"""How often a token that names an unknown key may make the server fetch the keys."""

_CHALLENGE = [(b"www-authenticate", b"Bearer")]
_LINE = re.compile(r"([\w.@-]{1,64}):([0-9a-f]{64})")


class Gate:
    """Lets everybody through; the others let through whom they know."""

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the caller's name, by the headers of a request.

        Raises:
            Problem: `unauthorized`.
        """
        return ""


def build_gate(settings: ServerSettings) -> Gate:
    """Build what the settings ask for.

    Raises:
        SettingsError: the file with keys is missing, or holds something else.
    """
    gates: list[Gate] = []
    if settings.api_keys_file is not None:
        gates.append(KeyGate(load_keys(settings.api_keys_file)))
    if settings.jwt_issuer:
        gates.append(TokenGate(settings.jwt_issuer, settings.jwt_audience, settings.jwt_jwks))
    if len(gates) == 2:
        return EitherGate(gates)
    return gates[0] if gates else Gate()


def load_keys(path: Path) -> dict[str, bytes]:
    """Load the digests of API keys: a line `NAME:SHA256` each; empty lines and those that begin with # say nothing.

    Raises:
        SettingsError: the file cannot be read, holds no key, or a line that is none; the message shows no digest.
    """
    try:
        lines = read_file(path, MAX_KEYS_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"--api_keys_file: cannot read {path}: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SettingsError(
                f"--api_keys_file: line {number} of {path} is not NAME:SHA256 with 64 lower-case hexadecimal digits"
            )
        if match[1] in keys:
            raise SettingsError(f"--api_keys_file: line {number} of {path} names {match[1]} a second time")
        keys[match[1]] = bytes.fromhex(match[2])
    if not keys:
        raise SettingsError(f"--api_keys_file: {path} holds no key; add a line NAME:SHA256")
    return keys


def _find_credential(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return credential.strip()
    return headers.get(b"x-api-key", b"")


def _refuse(detail: str) -> Problem:
    return Problem("unauthorized", detail, list(_CHALLENGE))


class KeyGate(Gate):
    """Knows callers by keys, of which it has the digests."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        credential = _find_credential(headers)
        if not credential:
            raise _refuse("send `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        digest = hashlib.sha256(credential).digest()
        found = ""
        for name, known in self._keys.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, known):
                found = name
        if not found:
            raise _refuse("the key is not known here")
        return found


class TokenGate(Gate):
    """Knows callers by the tokens that one issuer signed for one audience.

    Args:
        jwks: file, or http(s) address; fetched again every five minutes, and when a token names an unknown key.
    """

    def __init__(self, issuer: str, audience: str, jwks: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._source = jwks
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest of a token -> caller, end
        self._lock = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._load(is_first=True)

    def _load(self, *, is_first: bool = False) -> None:
        try:
            if self._source.startswith(("http://", "https://")):
                with urllib.request.urlopen(self._source, timeout=5) as answer:
                    content = answer.read(MAX_KEYS_BYTES)
            else:
                content = read_file(Path(self._source), MAX_KEYS_BYTES)
            keys = jwt.PyJWKSet.from_dict(parse_json(content)).keys
            self._keys = {key.key_id or "": key for key in keys}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
            if is_first:
                raise SettingsError(f"--jwt_jwks: cannot get keys from {self._source}: {error}") from error
        self._loaded_at = time.monotonic()

    def _refresh(self) -> None:
        """Fetch the keys on a thread, unless that is going on already: the event loop waits for nobody."""
        self._loaded_at = time.monotonic()

        def load() -> None:
            if self._lock.acquire(blocking=False):
                try:
                    self._load()
                finally:
                    self._lock.release()

        threading.Thread(target=load, name="jwks", daemon=True).start()

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        token = _find_credential(headers)
        if not token:
            raise _refuse("send `Authorization: Bearer TOKEN`")
        digest = hashlib.sha256(token).digest()
        age = time.monotonic() - self._loaded_at
        if age > REFRESH_S:
            self._refresh()
            self._known.clear()  # what a key that was withdrawn has signed must not live on
        known = self._known.get(digest)
        if known is not None and time.time() < known[1]:
            return known[0]
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
            key = self._keys.get(key_id)
            if key is None:
                if age > REFRESH_AT_MOST_EVERY_S:
                    self._refresh()
                raise _refuse("the token is signed with a key that is not known here")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self._issuer,
                audience=self._audience,
                options={"require": ["exp", "iss", "aud"]},
                leeway=5,
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refuse(f"the token is refused: {error}") from error
        caller = str(claims.get("sub", ""))[:64] or "token"
        self._known[digest] = (caller, float(claims["exp"]))
        if len(self._known) > MAX_TOKENS:
            self._known.popitem(last=False)
        return caller


class EitherGate(Gate):
    """Lets through whom one of several gates knows."""

    def __init__(self, gates: list[Gate]) -> None:
        self._gates = gates

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        for gate in self._gates[:-1]:
            try:
                return gate.recognise(headers)
            except Problem:
                continue
        return self._gates[-1].recognise(headers)
