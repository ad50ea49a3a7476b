"""Access to a remote folder by fsspec: S3, Google Cloud Storage, a web server. All its errors are one line."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote

from image_classifier.errors import RemoteError
from image_classifier.extras import load_extra
from image_classifier.files import MAX_JSON_BYTES, parse_json, read_file
from image_classifier.references import Url
from image_classifier.text import one_line

MANIFEST = "manifest.json"
"""Of a run and of a published model: written last, so that a folder without it is not whole."""

NUM_THREADS = 8
MAX_FILES = 2_000_000
_MAX_DEPTH = 32  # of the pages of a web server, which may have no end
_BESIDE_MANIFEST = "model.sig"  # which no manifest can name
_EXTRAS = {"s3": ("s3fs", "remote"), "gs": ("gcsfs", "gcs"), "http": ("aiohttp", "remote")}
_EXTRAS["https"] = _EXTRAS["http"]
_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "s3fs")
_UNENCODED = {"Accept-Encoding": "identity"}  # what is compressed on its way has no parts that can be asked for

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Patience:
    """How long a place may take.

    Attributes:
        num_tries: one after the other that come no further.
        backoff_s: pause after the first failure; doubled after each further one.
        timeout_s: to wait for a connection, or for the next bytes.
        piece: bytes that are asked for at once; fewer after a failure.
    """

    num_tries: int = 5
    backoff_s: float = 1.0
    timeout_s: float = 20.0
    piece: int = 2**23

    def get_pause_s(self, num_failed: int) -> float:
        """Get the pause after so many failures."""
        return self.backoff_s * 2.0 ** (num_failed - 1)


@dataclass(frozen=True)
class Object:
    """A file that lies elsewhere.

    Attributes:
        path: as fsspec takes it.
        size: in bytes; None where the server does not say.
        version: another one when the content is, such as an ETag; empty where the server does not say.
        md5: of the content, as hexadecimal digits, where the server says it.
        has_ranges: whether a part of it can be asked for.
    """

    path: str
    size: int | None
    version: str
    md5: str | None
    has_ranges: bool


class RetryError(Exception):
    """Something failed that may not fail again; the message is the reason."""


class ChangedError(Exception):
    """An object is another one than before."""


class Store:
    """A file or folder elsewhere."""

    def __init__(self, url: Url, patience: Patience) -> None:
        self.url = url
        self.patience = patience
        self.path = f"{_quote(str(url))}{url.query.reveal()}" if url.is_web else url.place

    @cached_property
    def fs(self) -> Any:
        """fsspec's file system. Its own retries are off, for failures are counted here.

        Raises:
            SettingsError: it is not installed.
        """
        fsspec, timeout_s = load_fsspec(self.url), self.patience.timeout_s
        options: dict[str, Any] = {}
        if self.url.scheme == "s3":
            timeouts = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
            options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": 1}}
        elif self.url.is_web:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": _UNENCODED, "encoded": True}
        fs = fsspec.filesystem(self.url.scheme, skip_instance_cache=True, **options)
        if self.url.scheme == "s3":
            fs.retries = 1
        return fs

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call something of fsspec's, and again where it failed for a reason that may pass.

        Raises:
            RemoteError: it failed.
        """
        for num_failed in range(1, self.patience.num_tries + 1):
            try:
                with self.explained():
                    return function(*arguments)
            except ChangedError:
                raise self.changed_error() from None
            except RetryError as error:
                reason = str(error)
            if num_failed < self.patience.num_tries:
                time.sleep(self.patience.get_pause_s(num_failed))
        raise self.failed_error(reason)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of fsspec's or of what is below it into a RemoteError, RetryError or ChangedError."""
        try:
            yield
        except Exception as error:  # each file system has its own types, some of which are no OSErrors
            context = error.__context__
            if isinstance(error, OSError | ValueError) or type(error).__module__.split(".")[0] in _LIBRARIES:
                raise self._explain(error) from None  # its text may hold the URL with its query
            if isinstance(context, OSError):  # s3fs fails where it looks at a timeout
                raise self._explain(context) from None
            raise

    def _explain(self, error: Exception) -> Exception:
        causes = [error]
        while isinstance(cause := causes[-1].__cause__, Exception):
            causes.append(cause)
        kinds = {kind.__name__ for each in causes for kind in type(each).__mro__}
        codes = {code for each in causes for code in _list_codes(each)}
        status = next((int(code) for code in codes if code.isdecimal()), 0)
        if "FileExpired" in kinds or codes & {"PreconditionFailed", "412"}:
            return ChangedError()
        remedy = _REMEDIES[self.url.scheme]
        if kinds & _LACKS_CREDENTIALS:
            return RemoteError(f"{self.url} needs credentials, and there are none; {remedy}")
        if "PermissionError" in kinds or codes & {"401", "403"}:
            return RemoteError(f"{self.url} refuses access ({' '.join(sorted(codes)) or 'no reason'}); {remedy}")
        if codes & _MISSING or (isinstance(error, FileNotFoundError) and len(causes) == 1):
            return self.missing_error()
        if kinds & _NO_ADDRESS or (400 <= status < 500 and status not in (408, 429)):
            reason = f"HTTP status {status}" if status else self._say(error)
            return RemoteError(f"{self.url} cannot be requested: {reason}; correct the URL")
        return RetryError(f"HTTP status {status}" if status else self._say(causes[-1]))

    def _say(self, error: Exception) -> str:
        """Say what an error says; of the web its type alone, for the text holds addresses, which may be signed."""
        text = getattr(error, "strerror", None) if self.url.is_web else one_line(error)
        return text or type(error).__name__

    def missing_error(self) -> RemoteError:
        return RemoteError(f"there is nothing at {self.url}; correct the URL")

    def failed_error(self, reason: str) -> RemoteError:
        tries = f"{self.patience.num_tries} times, last with"
        return RemoteError(f"{self.url} failed {tries}: {reason}; check the network, and start again to continue")

    def changed_error(self) -> RemoteError:
        return RemoteError(f"{self.url} was changed while it was read; start again")

    def read_below(self, name: str) -> bytes | None:
        """Read a small file below the URL; None if there is none."""

        def read() -> bytes | None:
            try:
                content: bytes = self.fs.cat_file(f"{self.path}/{name}")
                return content
            except FileNotFoundError:
                return None

        return self.call(read)

    def list_objects(self, *, missing_ok: bool = False) -> dict[str, Object]:
        """List what lies at the URL by the name that it gets here: the file itself, or the files of the folder.

        Hidden files are left out, and what marks folders.

        Raises:
            RemoteError: there is nothing, or a name that no file can have.
        """
        if self.url.is_web:
            infos = self._list_web()
        else:
            self.fs.invalidate_cache()
            infos = {}
            for path, info in self.call(partial(self.fs.find, self.path, detail=True)).items():
                name = self.url.name if path == self.path else path.removeprefix(f"{self.path}/")
                if info["type"] == "file" and not path.endswith("/"):
                    infos[name] = info
        objects = {name: describe_object(self.url, info) for name, info in infos.items() if not is_hidden(name)}
        if not objects and not missing_ok:
            raise self.missing_error()
        if len(objects) > MAX_FILES:
            raise RemoteError(f"{self.url} has more than the limit of {MAX_FILES:,} files")
        _check_names(self.url, objects)
        return objects

    def _list_web(self) -> dict[str, dict[str, Any]]:
        """List a web server's file, or the files that its pages of a folder link, or else those that its manifest
        names."""
        info = self._find_info(self.path)
        if self.url.query.reveal() or (info is not None and info.get("mimetype") != "text/html"):
            return {} if info is None else {self.url.name: info}
        top = f"{self.path}/"
        links = self.call(partial(self.fs.find, top, maxdepth=_MAX_DEPTH)) if info is not None else []
        names = {unquote(link.removeprefix(top)) for link in links if link.startswith(top) and not {"?", "#"} & {*link}}
        names.discard("")
        if not names and (manifest := self.read_below(MANIFEST)) is not None:
            names = {MANIFEST, _BESIDE_MANIFEST, *read_digests(manifest)}
        _check_names(self.url, names)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            infos = zip(sorted(names), pool.map(self._find_info, [top + quote(name) for name in sorted(names)]))
            return {name: info for name, info in infos if info is not None}

    def _find_info(self, path: str) -> dict[str, Any] | None:
        """Ask a web server for a file's size and version; None where nothing is, or a folder is not shown."""

        def ask() -> dict[str, Any] | None:
            try:
                info: dict[str, Any] = self.fs.info(path)
                return info
            except FileNotFoundError as error:  # whatever it was
                status = getattr(error.__cause__, "status", None)
                if status in (404, 410) or (status == 403 and not self.url.query.reveal()):
                    return None
                raise

        return self.call(ask)

    def open(self, entry: Object, *, has_ranges: bool) -> IO[bytes]:
        """Open an object such that each read asks for so many bytes, of the version that was listed.

        Args:
            has_ranges: whether parts are asked for; else it is read from its beginning to its end.
        """
        options: dict[str, Any] = {"cache_type": "none"}
        if self.url.is_web and not has_ranges:
            options = {"block_size": 0}
        elif self.url.is_web:
            if_match = {"If-Match": entry.version} if entry.version.startswith('"') else {}
            options |= {"size": entry.size, "headers": {**_UNENCODED, **if_match}}
        file: IO[bytes] = self.fs.open(entry.path, "rb", **options)
        return file


_REMEDIES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud",
    **dict.fromkeys(("http", "https"), "give a signed address, or one that needs no login"),
}
_LACKS_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"),
    *("UnauthorizedSSOTokenError", "SSOTokenLoadError", "DefaultCredentialsError"),
}
_MISSING = {"NoSuchBucket", "NoSuchKey", "404", "410"}
_NO_ADDRESS = {"ValueError", "ParamValidationError", "InvalidURL"}


def _list_codes(error: Exception) -> list[str]:
    """List the status of a web server's answer, or the code of S3's, such as NoSuchBucket."""
    status, response = getattr(error, "status", None), getattr(error, "response", None)
    codes = [str(status)] if type(status) is int else []
    return [*codes, str(response.get("Error", {}).get("Code"))] if isinstance(response, dict) else codes


def load_fsspec(url: Url) -> Any:
    """Import fsspec and what it needs for a URL.

    Raises:
        SettingsError: it is not installed.
    """
    load_extra(*_EXTRAS[url.scheme])
    return load_extra("fsspec", "remote")


def _quote(text: str) -> str:
    """Quote what no address can hold; what is quoted stays so."""
    return quote(text, safe="/:?%&=+,;@~!$'()*[]")


def is_hidden(name: str) -> bool:
    """Say whether a file is hidden, or lies in a hidden folder: temporary ones and snapshots do."""
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def describe_object(url: Url, info: Mapping[str, Any]) -> Object:
    """Describe an object by what fsspec says of it, in the words of its store."""
    size, etag = info.get("size"), str(info.get("ETag") or info.get("etag") or "")
    version = etag or str(info.get("generation") or info.get("Last-Modified") or "")
    md5 = None
    with suppress(ValueError):
        if url.scheme == "s3" and len(bytes.fromhex(etag.strip('"'))) == 16:
            md5 = etag.strip('"').lower()
        elif encoded := info.get("md5Hash") or info.get("Content-MD5"):
            md5 = base64.b64decode(encoded, validate=True).hex()
    return Object(str(info["name"]), size, version, md5, size is not None and bool(info.get("partial", True)))


def _check_names(url: Url, names: Collection[str]) -> None:
    for name in names:
        parts = name.split("/")
        is_name = name.isprintable() and "\\" not in name and not {"", ".", ".."} & {*parts}
        if not is_name or any(len(os.fsencode(part)) > 255 for part in parts):
            raise RemoteError(f"{url} has {name[:200]!a}, which is not a valid file name; rename it there")
        for number in range(1, len(parts)):
            if (above := "/".join(parts[:number])) in names:
                raise RemoteError(f"{url} has {above!a} both as a file and as a folder; rename one of them there")


def load_digests(path: Path) -> dict[str, str]:
    """Load the sha256 of each file that a manifest names; nothing of what is no manifest."""
    try:
        return read_digests(read_file(path, MAX_JSON_BYTES))
    except ValueError:
        return {}


def read_digests(manifest: bytes) -> dict[str, str]:
    """Read the sha256 of each file that a manifest names; nothing of what is no manifest."""
    with suppress(ValueError, AttributeError, TypeError, KeyError):
        return {name: str(facts["sha256"]) for name, facts in parse_json(manifest)["files"].items()}
    return {}
