"""Authentication: API keys, of which the server holds only digests, or JSON Web Tokens (JWT) of one issuer."""

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
from contextlib import suppress
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
    import jwt  # imports cryptography: a tenth of the start of a server that needs no tokens

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Algorithms with a public key. `none` and shared secrets are refused."""

MAX_KEYS_BYTES = 2**20
MAX_TOKENS = 1024
REFRESH_S = 300.0
"""Interval at which the issuer's keys are fetched, even if `--reload_every_s` is longer."""

REFRESH_AT_MOST_EVERY_S = 10.0
"""Shortest time between two fetches that requests cause, by a token with an unknown key or because all keys expired."""

KEYS_LIVE_S = 3600.0
"""Time without a successful fetch after which the issuer's keys are no longer trusted."""

WAIT_S = 5.0
"""Timeout of the issuer's connection, and of each read."""

FETCH_S = 10.0
"""Timeout of the issuer's whole answer."""

Count = Callable[[str, bool], None]
"""Called after each attempt to reload keys, with the option that names them and whether it succeeded."""

logger = logging.getLogger(__name__)

_LINE = re.compile(r"([\w.@-]{1,64}):([0-9a-f]{64})")


class Gate:
    """Authenticates callers. This one accepts a caller that any of several gates accepts; without gates, everybody.

    Attributes:
        refresh_s: longest time between two calls of `refresh`, in seconds; infinite if nothing expires.
    """

    refresh_s = float("inf")

    def __init__(self, *gates: Gate) -> None:
        self._gates = gates
        self.refresh_s = min((gate.refresh_s for gate in gates), default=self.refresh_s)

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the caller's name, from the headers of a request.

        Raises:
            Problem: `unauthorized`.
        """
        for gate in self._gates[:-1]:
            with suppress(Problem):
                return gate.recognise(headers)
        return self._gates[-1].recognise(headers) if self._gates else ""

    def refresh(self) -> None:
        """Reload the keys, over the network in a background thread.

        A failure is logged and counted, and the previous keys stay valid.
        """
        for gate in self._gates:
            gate.refresh()


def _ignore(option: str, is_done: bool) -> None:
    pass


def build_gate(settings: ServerSettings, count: Count = _ignore) -> Gate:
    """Build the gate of the settings.

    Raises:
        SettingsError: the key file is missing or malformed, or the issuer's keys cannot be loaded.
    """
    gates: list[Gate] = []
    if settings.api_keys_file is not None:
        gates.append(KeyGate(settings.api_keys_file, count))
    if settings.jwt_issuer:
        gates.append(TokenGate(settings.jwt_issuer, settings.jwt_audience, settings.jwt_jwks, count=count))
    return gates[0] if len(gates) == 1 else Gate(*gates)


def load_keys(path: Path) -> dict[str, bytes]:
    """Load the digests of API keys from lines `NAME:SHA256`. Empty lines and lines that start with # are skipped.

    Raises:
        SettingsError: the file cannot be read, has no key or a malformed line. The message shows no digest.
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
            raise SettingsError(f"--api_keys_file: line {number} of {path} repeats the name {match[1]}")
        keys[match[1]] = bytes.fromhex(match[2])
    if not keys:
        raise SettingsError(f"--api_keys_file: {path} has no key; add a line NAME:SHA256")
    return keys


def _find_credential(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return credential.strip()
    return headers.get(b"x-api-key", b"")


def _refuse(detail: str) -> Problem:
    return Problem("unauthorized", detail, [(b"www-authenticate", b"Bearer")])


class KeyGate(Gate):
    """Authenticates callers by API keys, whose digests are in a file.

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
            logger.error("reloading the API keys failed, the previous ones stay valid: %s", error)
            self._count("api_keys_file", False)
            return
        if keys != self._keys:
            logger.info("%s changed: %d API keys are now valid", self._path, len(keys))
        self._keys = keys
        self._count("api_keys_file", True)

    def recognise(self, headers: Mapping[bytes, bytes]) -> str:
        credential = _find_credential(headers)
        if not credential:
            raise _refuse("send `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        digest = hashlib.sha256(credential).digest()
        found = ""
        for name, known in self._keys.items():  # always all of them, against timing attacks
            if hmac.compare_digest(digest, known):
                found = name
        if not found:
            raise _refuse("the API key is not valid")
        return found


@dataclass(frozen=True)
class _IssuerKeys:
    """The issuer's keys of one fetch, and a cache of the tokens that they verified.

    New keys come with an empty cache, so that no token outlives a withdrawn key.
    """

    content: bytes
    by_id: Mapping[str, jwt.PyJWK]
    callers: OrderedDict[bytes, tuple[str, float]] = field(default_factory=OrderedDict)  # by digest: name, expiry


class TokenGate(Gate):
    """Authenticates callers by tokens that one issuer signed for one audience.

    Args:
        jwks: file or https URL of the issuer's keys. They are reloaded by `refresh`, and at most every ten seconds for
            a token with an unknown key. After an hour without success they expire.
        clock: returns monotonic seconds.

    Raises:
        SettingsError: the keys cannot be loaded.
    """

    refresh_s = REFRESH_S

    def __init__(
        self, issuer: str, audience: str, jwks: str, clock: Callable[[], float] = time.monotonic, count: Count = _ignore
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
            if self._is_refreshing:  # the running thread loads them once more
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
            text = "reloading the keys at %s failed, the previous ones stay valid for %.0f s: %s"
            logger.error(text, self._source, max(0.0, self._loaded_at + KEYS_LIVE_S - began), error)
            self._count("jwt_jwks", False)
            return
        if keys.content != self._keys.content:
            logger.info("the keys at %s changed: %d are now valid", self._source, len(keys.by_id))
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
            self._refresh_soon()
            raise _refuse("the issuer's keys have been unavailable for too long; try again later")
        digest = hashlib.sha256(token).digest()
        known = keys.callers.get(digest)
        if known is not None and time.time() < known[1]:
            return known[0]
        try:
            key_id = str(jwt.get_unverified_header(token).get("kid", ""))
            key = keys.by_id.get(key_id)
            if key is None:
                self._refresh_soon()
                raise _refuse("the token is signed with an unknown key")
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self._issuer,
                audience=self._audience,
                options={"require": ["exp", "iss", "aud"]},
                leeway=5,
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refuse(f"the token is not valid: {error}") from error
        caller = str(claims.get("sub", "")).encode("utf-8", "replace").decode()[:64] or "token"
        keys.callers[digest] = (caller, float(claims["exp"]))
        if len(keys.callers) > MAX_TOKENS:
            keys.callers.popitem(last=False)
        return caller

    def _refresh_soon(self) -> None:
        if self._clock() - self._tried_at > REFRESH_AT_MOST_EVERY_S:
            self.refresh()


def _load_issuer_keys(source: str) -> _IssuerKeys:
    """Load an issuer's public keys from a file or an https URL.

    Raises:
        ValueError: they cannot be loaded, or none can verify signatures.
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
        raise ValueError("it has no public key that can verify signatures")
    return _IssuerKeys(content, {str(key.key_id or ""): key for key in usable})


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: an issuer's keys come only from the configured URL."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _fetch(address: str) -> bytes:
    """Fetch an https URL, at most `MAX_KEYS_BYTES`.

    `jwt.PyJWKClient` limits neither size nor total time, and would fetch on the event loop's thread.

    Raises:
        OSError: timeout, redirect, a status other than 200, or a certificate that is not trusted.
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
                    raise ValueError(f"it has more than the {MAX_KEYS_BYTES:,} bytes allowed")
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer takes longer than {FETCH_S:g} s")
    except urllib.error.HTTPError as error:
        error.close()
        what = "redirects, which is not allowed" if 300 <= error.code < 400 else "failed"
        raise OSError(f"the request {what} (status {error.code})") from error
    return content
