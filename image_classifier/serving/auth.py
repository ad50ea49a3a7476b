"""Who may ask: API keys of which only digests are kept, or JSON web tokens of one issuer."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from image_classifier.errors import SettingsError
from image_classifier.files import parse_json, read_file
from image_classifier.serving.problems import Problem
from image_classifier.serving.settings import ServerSettings
from image_classifier.text import one_line

if TYPE_CHECKING:
    import jwt  # with cryptography, which takes a server without tokens a tenth of its start

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Those with a public key; `none` and those with a shared secret are refused."""

MAX_KEYS_BYTES = 2**20
MAX_TOKENS = 1024
REFRESH_S = 300.0
"""The issuer's keys are fetched at least this often, however rarely other things are read again."""

REFRESH_AT_MOST_EVERY_S = 10.0
"""How often requests may make the server fetch the keys: for an unknown one, and where all are too old."""

KEYS_LIVE_S = 3600.0
"""After so long without a successful fetch the issuer's keys are no longer trusted."""

WAIT_S = 5.0
"""For the issuer's connection, and for each part of its answer."""

FETCH_S = 10.0
"""For the issuer's whole answer."""

Count = Callable[[str, bool], None]
"""Told after each attempt to read keys again: which option names them, and whether it worked."""

logger = logging.getLogger(__name__)

_CHALLENGE = [(b"www-authenticate", b"Bearer")]
_LINE = re.compile(r"([\w.@-]{1,64}):([0-9a-f]{64})")


class Gate:
    """Lets everybody through; the others let through whom they know.

    Attributes:
        refresh_s: seconds after which `refresh` is due at the latest; infinite where nothing gets old.
    """

    refresh_s = float("inf")

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the caller's name, by the headers of a request.

        Raises:
            Problem: `unauthorized`.
        """
        return ""

    def refresh(self) -> None:
        """Read again what says who may ask; the network is asked in the background.

        What cannot be read is logged and counted, and what was known before stays.
        """


def _ignore(option: str, is_done: bool) -> None:
    pass


def build_gate(settings: ServerSettings, count: Count = _ignore) -> Gate:
    """Build what the settings ask for.

    Raises:
        SettingsError: the file with keys is missing, or holds something else; or the issuer's keys cannot be had.
    """
    gates: list[Gate] = []
    if settings.api_keys_file is not None:
        gates.append(KeyGate(settings.api_keys_file, count))
    if settings.jwt_issuer:
        gates.append(TokenGate(settings.jwt_issuer, settings.jwt_audience, settings.jwt_jwks, count=count))
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
        raise SettingsError(f"--api_keys_file: cannot read {path}: {one_line(error)}") from error
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
    """Knows callers by the keys of a file, of which it has the digests.

    Raises:
        SettingsError: as `load_keys`.
    """

    def __init__(self, path: Path, count: Count = _ignore) -> None:
        self._count = count
        self._path = path
        self._keys = load_keys(path)

    def refresh(self) -> None:
        try:
            keys = load_keys(self._path)
        except SettingsError as error:
            logger.error("the API keys were not read again, those of before are still accepted: %s", error)
            self._count("api_keys_file", False)
            return
        if keys != self._keys:
            logger.info("%s changed: %d API keys are accepted from now on", self._path, len(keys))
        self._keys = keys
        self._count("api_keys_file", True)

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


@dataclass(frozen=True)
class _IssuerKeys:
    """The issuer's keys of one fetch, and the callers whose tokens they have verified.

    A withdrawn key takes its callers along: other keys are another object, also for a request that has begun.
    """

    content: bytes
    by_id: Mapping[str, jwt.PyJWK]
    callers: OrderedDict[bytes, tuple[str, float]] = field(default_factory=OrderedDict)  # by digest; until when

    def remember(self, digest: bytes, caller: str, end: float) -> None:
        self.callers[digest] = (caller, end)
        if len(self.callers) > MAX_TOKENS:
            self.callers.popitem(last=False)


class TokenGate(Gate):
    """Knows callers by the tokens that one issuer signed for one audience.

    Args:
        jwks: file or https address of the issuer's keys. They are read again by `refresh`, and when a token names an
            unknown key, at most once in ten seconds. After an hour without success none counts.
        clock: gives seconds, from any beginning.

    Raises:
        SettingsError: the keys cannot be had.
    """

    refresh_s = REFRESH_S

    def __init__(
        self,
        issuer: str,
        audience: str,
        jwks: str,
        clock: Callable[[], float] = time.monotonic,
        count: Count = _ignore,
    ) -> None:
        self._count = count
        self._issuer = issuer
        self._audience = audience
        self._source = jwks
        self._clock = clock
        self._lock = threading.Lock()
        self._is_wanted = self._is_refreshing = False
        self._tried_at = self._loaded_at = clock()
        try:
            self._keys = _load_issuer_keys(jwks)
        except ValueError as error:
            raise SettingsError(f"--jwt_jwks: cannot get keys from {jwks}: {error}") from error

    def refresh(self) -> None:
        self._tried_at = self._clock()
        with self._lock:
            self._is_wanted = True
            if self._is_refreshing:  # which loads them once more when it is done
                return
            self._is_refreshing = True
        threading.Thread(target=self._load_while_wanted, name="jwks", daemon=True).start()

    def _load_while_wanted(self) -> None:
        while True:
            with self._lock:
                self._is_refreshing, self._is_wanted = self._is_wanted, False
                if not self._is_refreshing:
                    return
            self._load()

    def _load(self) -> None:
        began = self._clock()
        try:
            keys = _load_issuer_keys(self._source)
        except ValueError as error:
            text = "the keys at %s were not read again, those of before count for %.0f s more: %s"
            logger.error(text, self._source, max(0.0, self._loaded_at + KEYS_LIVE_S - began), error)
            self._count("jwt_jwks", False)
            return
        if keys.content != self._keys.content:
            logger.info("the keys at %s changed: %d are accepted from now on", self._source, len(keys.by_id))
            self._keys = keys
        self._loaded_at = began
        self._count("jwt_jwks", True)

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        import jwt

        token = _find_credential(headers)
        if not token:
            raise _refuse("send `Authorization: Bearer TOKEN`")
        keys = self._keys
        if self._clock() - self._loaded_at > KEYS_LIVE_S:
            self._ask_again()
            raise _refuse("the issuer's keys have not been available for too long; try again later")
        digest = hashlib.sha256(token).digest()
        known = keys.callers.get(digest)
        if known is not None and time.time() < known[1]:
            return known[0]
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
            key = keys.by_id.get(key_id)
            if key is None:
                self._ask_again()
                raise _refuse("the token is signed with a key that is not known here")
            claims = self._verify(token, key)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refuse(f"the token is refused: {error}") from error
        caller = str(claims.get("sub", "")).encode("utf-8", "replace").decode()[:64] or "token"
        keys.remember(digest, caller, float(claims["exp"]))
        return caller

    def _ask_again(self) -> None:
        if self._clock() - self._tried_at > REFRESH_AT_MOST_EVERY_S:
            self.refresh()

    def _verify(self, token: bytes, key: jwt.PyJWK) -> dict[str, Any]:
        import jwt

        return jwt.decode(
            token,
            key,
            algorithms=ALGORITHMS,
            issuer=self._issuer,
            audience=self._audience,
            options={"require": ["exp", "iss", "aud"]},
            leeway=5,
        )


def _load_issuer_keys(source: str) -> _IssuerKeys:
    """Load the public keys to verify signatures with, from a file or an https address.

    Raises:
        ValueError: they cannot be had, or there is none.
    """
    import jwt

    reasons = (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException, jwt.PyJWTError)
    try:
        is_address = urlsplit(source).scheme == "https"
        content = _fetch(source) if is_address else read_file(Path(source), MAX_KEYS_BYTES)
        found = jwt.PyJWKSet.from_dict(parse_json(content)).keys
    except reasons as error:
        raise ValueError(one_line(error)) from error
    usable = [key for key in found if key.public_key_use in (None, "sig") and key.algorithm_name in ALGORITHMS]
    if not usable:
        raise ValueError("it holds no public key to verify signatures with")
    return _IssuerKeys(content, {str(key.key_id or ""): key for key in usable})


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An issuer's keys come from the address that was given, or not at all."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _fetch(address: str) -> bytes:
    """Fetch an https address, up to MAX_KEYS_BYTES.

    `jwt.PyJWKClient` reads answers of any size for any time, and asks on the thread of whoever has a token.

    Raises:
        OSError: no answer in time, none with status 200, or a redirect; or the certificate is not trusted.
        ValueError: the answer is too large.
    """
    end = time.monotonic() + FETCH_S
    content = b""
    opener = urllib.request.build_opener(_NoRedirects)
    request = urllib.request.Request(address, headers={"Accept": "application/json"})
    try:
        with opener.open(request, timeout=WAIT_S) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > MAX_KEYS_BYTES:
                    raise ValueError(f"it has more than the {MAX_KEYS_BYTES:,} bytes that are read")
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer takes longer than {FETCH_S:g} s")
    except urllib.error.HTTPError as error:
        error.close()
        what = "is a redirect, which is not followed" if 300 <= error.code < 400 else "is no success"
        raise OSError(f"the answer's status {error.code} {what}") from error
    return content


class EitherGate(Gate):
    """Lets through whom one of several gates knows."""

    def __init__(self, gates: list[Gate]) -> None:
        self._gates = gates
        self.refresh_s = min(gate.refresh_s for gate in gates)

    def refresh(self) -> None:
        for gate in self._gates:
            gate.refresh()

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        for gate in self._gates[:-1]:
            try:
                return gate.recognise(headers)
            except Problem:
                continue
        return self._gates[-1].recognise(headers)
