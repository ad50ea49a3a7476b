"""The options of commands that read data and models: image files, a database and its password, a public key."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.choices import Fit
from image_classifier.credentials import Secret, resolve_password
from image_classifier.errors import SettingsError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize
from image_classifier.progress import paused
from image_classifier.references import get_url

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

PASSWORD_OPTION = "--db_pass"

register_type(Secret, serializer=repr, deserializer=Secret)


def add_password_option(parser: ArgumentParser) -> None:
    """Add the option that takes the password itself."""
    parser.add_argument(
        PASSWORD_OPTION,
        type=Secret | None,
        default=None,
        help="password of the database; other users of this machine may see it. DB_PASSWORD in the environment and "
        "--db_pass_file stay private",
    )


def add_access_options(parser: ArgumentParser) -> None:
    """Add the options that say how the database is reached."""
    parser.add_argument(
        "--db_config",
        type=Path | None,
        default=None,
        help="YAML file that says where the database is; without it, a file of SQLite in the dataset folder",
    )
    parser.add_argument(
        "--db_pass_file",
        type=Path | None,
        default=None,
        help="file with the password of the database, which may also be in DB_PASSWORD",
    )
    add_password_option(parser)


def add_reading_options(parser: ArgumentParser) -> None:
    """Add the options that say how image files are read."""
    parser.add_argument(
        "--fit",
        type=Fit,
        default="squeeze",
        help="images of other sizes are resized without keeping the aspect ratio (squeeze), cut to the central square "
        "(crop), padded with black (pad), or refused",
    )
    add_image_size_option(parser)
    add_skip_bad_option(parser)


def add_skip_bad_option(parser: ArgumentParser) -> None:
    """Add the option that leaves out images that cannot be read."""
    parser.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read, and list them")


def add_image_size_option(parser: ArgumentParser) -> None:
    """Add the option that says which size images get."""
    parser.add_argument(
        "--image_size",
        type=ImageSize | None,
        default=None,
        help=f"side in pixels that all images are resized to; {DEFAULT_IMAGE_SIZE} by default, and for what is in a "
        "database its own",
    )


def add_public_key_option(parser: ArgumentParser) -> None:
    """Add the option that names the key of whoever must have signed a published model."""
    parser.add_argument(
        "--public_key", type=Path | None, default=None, help="PEM file of the key that the model must be signed by"
    )


def build_reading(options: Namespace) -> Reading:
    """Build the settings for reading image files from the parsed options."""
    return Reading(fit=options.fit, skip_bad=options.skip_bad, image_size=options.image_size)


def build_access(options: Namespace, dataset_folder: Path) -> DatabaseAccess:
    """Build the settings for reaching the database from the parsed options."""
    return DatabaseAccess(
        config=options.db_config,
        password=take_password(options) or resolve_password(options.db_pass_file),
        ask=get_asking(),
        dataset_folder=dataset_folder,
    )


def take_password(options: Namespace | dict[str, Any]) -> Secret | None:
    """Take the password that was given as an option, and warn; start anew without it where the command line shows it.

    Raises:
        SettingsError: a file with the password was given, too.
    """
    secret: Secret | None = options.pop("db_pass", None)
    if secret is None:
        return None
    if options.get("db_pass_file") is not None:
        raise SettingsError(f"{PASSWORD_OPTION} and --db_pass_file both give the password: leave one of them out")
    words = hide_password(sys.orig_argv)
    if words != sys.orig_argv:
        print(
            f"warning: others on this machine can read what {PASSWORD_OPTION} is given; use DB_PASSWORD in the "
            "environment, or --db_pass_file",
            file=sys.stderr,
            flush=True,
        )
        # The system shows a process's first words for as long as it lives. The environment is its owner's alone.
        os.execve(sys.executable, words, {**os.environ, "DB_PASSWORD": secret.reveal()})
    return secret


def hide_password(words: list[str]) -> list[str]:
    """Leave out the password and its option."""
    kept = []
    remaining = iter(words)
    for word in remaining:
        if word == PASSWORD_OPTION:
            next(remaining, None)
        elif not word.startswith(f"{PASSWORD_OPTION}="):
            kept.append(word)
    return kept


def get_asking() -> Callable[[], Secret] | None:
    """Give what asks for the password, if somebody sits there to answer."""

    def ask() -> Secret:
        with paused():
            return Secret(getpass.getpass("password of the database: "))

    return ask if sys.stdin is not None and sys.stdin.isatty() else None


def check_local(dataset_folder: Path) -> None:
    """Check that the folder that is written to lies on this machine.

    Raises:
        SettingsError: it is a URL.
    """
    if get_url(dataset_folder) is not None:
        raise SettingsError("--dataset_folder is written to here, so it must be a folder on this machine, got a URL")
