"""Where the database is: `db_connect.yaml`, and the file that --db_config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from image_classifier.access import DatabaseAccess
from image_classifier.errors import SettingsError
from image_classifier.files import load_yaml
from image_classifier.text import one_line

Driver = Literal["sqlite", "postgresql"]
Tls = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

PACKAGED_CONFIG = Path(__file__).with_name("db_connect.yaml")


LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a database is; `db_connect.yaml` says what each key means."""

    driver: Driver
    database: str
    host: str
    port: int
    user: str | None
    tls: Tls | None
    tls_root: Path | None
    timeout_s: int
    answer_timeout_s: int
    num_tries: int

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.host in LOCAL_HOSTS or self.host.startswith("/")

    @property
    def title(self) -> str:
        """What to call it in a message."""
        if self.driver == "sqlite":
            return self.database
        return f"{self.database} at {self.host}:{self.port}"


def load_place(access: DatabaseAccess) -> Place:
    """Load where the database is: the packaged db_connect.yaml, and over it the file that was named.

    Raises:
        SettingsError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    values = _load_config(PACKAGED_CONFIG)
    if access.config is not None:
        values |= _load_config(access.config)
    if values["driver"] == "sqlite":
        values["database"] = str(access.dataset_folder / values["database"])
    elif access.config is not None and values["database"] == _load_config(PACKAGED_CONFIG)["database"]:
        raise SettingsError(f"--db_config: {access.config} needs the key database, the name of the database")
    values["tls_root"] = values["tls_root"] and Path(values["tls_root"])
    return Place(**values)


def _load_config(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--db_config: {path} cannot be read as YAML: {one_line(error)}; correct it") from None
    known = [field.name for field in fields(Place)]
    if not isinstance(content, dict):
        raise SettingsError(f"--db_config: {path} must contain keys and values: {', '.join(known)}")
    if "password" in content:
        raise SettingsError(
            f"--db_config: {path} has a password, which does not belong there: put it into DB_PASSWORD in the "
            "environment, or into a file for --db_pass_file"
        )

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**16

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and value != "" and value.isprintable()

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "driver": (lambda value: value in get_args(Driver), " or ".join(get_args(Driver))),
        "database": (is_text, "a name, of sqlite a path"),
        "host": (is_text, "a name or an address"),
        "port": (is_count, "a whole number from 1 to 65535"),
        "user": (lambda value: value is None or is_text(value), "a name, or null"),
        "tls": (lambda value: value is None or value in get_args(Tls), f"null or one of {', '.join(get_args(Tls))}"),
        "tls_root": (lambda value: value is None or is_text(value), "a path, or null"),
        "timeout_s": (is_count, "a whole number from 1 on"),
        "answer_timeout_s": (is_count, "a whole number from 1 on"),
        "num_tries": (is_count, "a whole number from 1 on"),
    }
    for key, value in content.items():
        if key not in checks:
            raise SettingsError(
                f"--db_config: {path} has the unknown key {ascii(key)[:50]}; it may have {', '.join(known)}"
            )
        accepts, takes = checks[key]
        if not accepts(value):
            raise SettingsError(f"--db_config: {path}: {key} takes {takes}, got: {ascii(value)[:100]}")
    return content
