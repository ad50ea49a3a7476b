"""References that are not paths: data sets in the database, torchvision's weights, and URLs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from image_classifier.credentials import Secret
from image_classifier.errors import SettingsError

DATABASE_PREFIX = "db:"


_PUBLISHED = re.compile(r"torchvision:([a-z0-9_]{1,100})@([A-Za-z0-9_]{1,100})")


_URL = re.compile(r"(s3|gs|https?|file):/+([^?#]*)([?#].*)?", re.DOTALL)
"""With one slash, too: a path has no two, so that one which was made of a URL has lost one."""

_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
"""Of a web server; the name of a bucket is no more than that."""


_REFERENCE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})(?:@([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Reference:
    """A data set in a database, and which of its versions; None is the newest."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse_reference(text: str) -> Reference:
    """Parse NAME or NAME@VERSION.

    Raises:
        SettingsError: it is neither.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise SettingsError(
            "a data set in a database is NAME or NAME@VERSION, of letters, digits, dots, dashes and underscores and a "
            f"whole number, got: {text[:200]!a}"
        )
    return Reference(match[1], int(match[2]) if match[2] else None)


def get_reference(dataset: Path | str) -> Reference | None:
    """Parse db:NAME or db:NAME@VERSION, which may stand where a folder may; None for a path.

    Raises:
        SettingsError: it begins with db: and does not go on so.
    """
    text = str(dataset)
    return parse_reference(text.removeprefix(DATABASE_PREFIX)) if text.startswith(DATABASE_PREFIX) else None


def get_published_weights(model: Path | str) -> tuple[str, str] | None:
    """Parse torchvision:NETWORK@WEIGHTS, which may stand where a model file may; None for a path.

    Raises:
        SettingsError: it begins with torchvision: and does not go on so.
    """
    if not str(model).startswith("torchvision:"):
        return None
    match = _PUBLISHED.fullmatch(str(model))
    if match is None:
        raise SettingsError(
            "--pretrained_model takes a path, or torchvision:NETWORK@WEIGHTS such as "
            f"torchvision:resnet18@IMAGENET1K_V1, got: {str(model)[:200]!a}"
        )
    return match[1], match[2]


@dataclass(frozen=True)
class Url:
    """The address of a folder or a file that lies elsewhere, in one of fsspec's file systems.

    Attributes:
        scheme: s3, gs, http, https or file.
        place: what follows it: the bucket and key, or the host and path; without a slash at the end.
        query: what follows that in an address of the web, with its question mark. It may be a signature.
    """

    scheme: str
    place: str
    query: Secret = Secret("")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}"

    @property
    def name(self) -> str:
        """The last part of the place, as a file or folder here is called."""
        return unquote(self.place.rpartition("/")[2]) if self.is_web else self.place.rpartition("/")[2]

    @property
    def is_web(self) -> bool:
        """Whether a web server answers, which can be read alone."""
        return self.scheme in ("http", "https")

    def join(self, name: str) -> Url:
        """Name a file or folder below."""
        return Url(self.scheme, f"{self.place}/{name}")

    def find_local_path(self) -> Path | None:
        """Find the path of a file:// URL; None for any other."""
        return Path(unquote(self.place)) if self.scheme == "file" else None


REGISTERED = "models:/"
"""What the name of a model in a registry begins with."""


def get_url(place: Path | str) -> Url | None:
    """Parse a URL, which may stand where a folder may; None for a path.

    Raises:
        SettingsError: it holds a password, has a query that its scheme does not know, or names nothing. The message
            does not repeat it.
    """
    match = _URL.fullmatch(str(place))
    if match is None:
        return None
    scheme, rest, query = match[1], match[2].rstrip("/"), match[3] or ""
    host = rest.partition("/")[0]
    if not _HOST.fullmatch(host) and scheme != "file":
        raise SettingsError(
            f"a URL with {scheme}:// needs a bucket or host behind it, and no name or password: these are left to the "
            "environment, as docs/remote.md says"
        )
    if query and (scheme not in ("http", "https") or query.startswith("#")):
        raise SettingsError(f"a URL with {scheme}:// takes nothing behind a ? or #; leave that out")
    parts = (unquote(rest) if scheme in ("http", "https", "file") else rest).split("/")
    if len(parts) > 1 + rest.count("/") or not {"", ".", ".."}.isdisjoint(parts[1:]):
        raise SettingsError(f"the path of a URL with {scheme}:// must not hold //, /./ or /../; write it without")
    return Url(scheme, f"/{rest}" if scheme == "file" else rest, Secret(query))


def describe_place(place: Path | str) -> str:
    """Write a path as it is, and a URL without what may be secret: for people and records."""
    url = get_url(place)
    return str(place) if url is None else str(url)


TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql")
"""Of the addresses of MLflow's stores."""


def check_tracking_uri(uri: str) -> None:
    """Check that the address of an MLflow store is one, without a password, which the record of a run would keep.

    Raises:
        SettingsError: it is not, or has one.
    """
    try:
        parts = urlsplit(uri)
        kind, has_password = parts.scheme.partition("+")[0], parts.password is not None
    except ValueError as error:
        raise SettingsError(f"--tracking_uri is no address: {error}") from error
    if kind not in TRACKING_SCHEMES or "://" not in uri:
        raise SettingsError(f"--tracking_uri takes {', '.join(f'{s}://' for s in TRACKING_SCHEMES)}, got: {kind!a}")
    if has_password:
        raise SettingsError(
            "--tracking_uri must not contain a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN; a database's goes into its own password file"
        )
