"""`image_classifier serve MODEL`: a published model over HTTP."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import build_parser, execute, get_options
from image_classifier.errors import SettingsError
from image_classifier.extras import check_extra, load_extra
from image_classifier.references import REGISTERED, get_url
from image_classifier.serving.settings import ServerSettings
from image_classifier.text import one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from image_classifier.serving.source import Resolve

ENVIRONMENT_FILE = ".env"
MODULES = (
    "onnxruntime",
    "orjson",
    "prometheus_client",
    "fastapi",
    "pydantic",
    "uvicorn",
    "httptools",
    "uvloop",
    "jwt",
    "python_multipart",
)
"""Without one of them there is nothing to serve with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as the command line says and return the exit status."""
    return execute(_serve, argv, shows_progress=False)


def build_serve_parser() -> ArgumentParser:
    """Build the parser of `serve`."""
    parser = build_parser(
        "serve",
        "Serve a published model over HTTP. Each option can also come from the environment, as "
        "IMAGE_CLASSIFIER_<OPTION>, and from a file .env in the current folder.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=str,
        default=os.environ.get("IMAGE_CLASSIFIER_MODEL", ""),
        help="published folder or ONNX file, or its URL, or models:/NAME@ALIAS",
    )
    parser.add_class_arguments(ServerSettings, None, skip={"model"})
    return parser


def _serve(argv: Sequence[str] | None) -> int:
    load_environment_file(Path(ENVIRONMENT_FILE))
    arguments = parse_arguments(build_serve_parser(), argv)
    settings = ServerSettings(**get_options(arguments, list(ServerSettings.__dataclass_fields__)))

    gc.disable()  # until it serves: what is imported is no garbage
    try:
        return serve(settings)
    finally:
        gc.enable()


def serve(settings: ServerSettings) -> int:
    """Serve until a signal comes, and return the exit status.

    Raises:
        ImageClassifierError: an extra is missing, or the model, the keys or the address are not as they should be.
    """
    for module in MODULES:
        check_extra(module, "serve")
    from image_classifier.serving.source import ModelSource

    resolve = find_resolver(settings)
    source = ModelSource(settings, resolve)
    second = settings.canary or settings.shadow
    candidate = ModelSource(settings, resolve, second) if second else None
    source.begin()  # while the rest is imported
    from image_classifier.serving import server

    return server.serve(settings, source, candidate)


def load_environment_file(path: Path) -> None:
    """Add the IMAGE_CLASSIFIER_ settings of a file to the environment, below what stands there.

    Raises:
        SettingsError: it cannot be read.
    """
    if not path.is_file():
        return
    try:
        values = load_extra("dotenv", "serve").dotenv_values(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {one_line(error)}") from error
    for name, value in values.items():
        if name.startswith(("IMAGE_CLASSIFIER_", "OTEL_")) and value is not None:
            os.environ.setdefault(name, value)


def find_resolver(settings: ServerSettings) -> Resolve | None:
    """Find what looks up names of models in the registry and fetches those that are URLs; None if all are paths."""
    names = (settings.model, settings.canary, settings.shadow)
    if not any(name.startswith(REGISTERED) or get_url(name) is not None for name in names):
        return None
    resolve_registered = partial(resolve_name, settings.tracking_uri or None, settings.experiments_folder)
    return lambda name: resolve_registered(name) if name.startswith(REGISTERED) else fetch_model(name)


def fetch_model(url: str) -> tuple[Path, None]:
    """Fetch a published model, unless it is here and still the same there; nothing else names its version.

    Raises:
        RemoteError: it cannot be fetched.
    """
    from image_classifier.remote.cache import localize

    return localize(url), None


def resolve_name(tracking_uri: str | None, experiments_folder: Path, name: str) -> tuple[Path, str]:
    """Resolve models:/NAME@ALIAS to the published folder, fetched and checked, and the version's number.

    Raises:
        RegistryError: the registry cannot be reached, or has no such version.
        ModelError: its files are not what was registered.
    """
    from image_classifier.publishing.registry import Registry

    folder, version = Registry(tracking_uri, experiments_folder).resolve(name)
    return folder, version.number


PARSERS = (build_serve_parser,)
