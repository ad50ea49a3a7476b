"""Finds networks, optimizers and data sources by name, in this and other packages.

It does not import torch: names are checked with the settings, and the stage that needs a plug-in imports its code.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points, packages_distributions
from pathlib import Path
from typing import Any, Literal, TypeVar

from image_classifier.errors import ImageClassifierError, SettingsError
from image_classifier.files import check_form
from image_classifier.text import quote_unprintable

Kind = Literal["model", "optimizer", "source", "workflow"]
"""Kind of a plug-in: the setting that names it, a data source, or a workflow."""

GROUPS: dict[Kind, str] = {
    "model": "image_classifier.networks",
    "optimizer": "image_classifier.optimizers",
    "source": "image_classifier.sources",
    "workflow": "image_classifier.workflows",
}
"""Group of entry points by kind."""

ALLOWED = "IMAGE_CLASSIFIER_PLUGINS"
"""Environment variable with plug-ins, separated by spaces, that files may name for import."""

SCALES = range(16, 225)
"""Resolutions in pixels that a training step or a network may use."""


@dataclass(frozen=True)
class Network:
    """A built-in network.

    Attributes:
        target: callable that builds it for a number of classes, as module:attribute.
        options: keyword arguments of the callable.
        image_sizes: supported resolutions in pixels.
        takes_muon: whether Muon has learning rates for it.
        needs: why it does not support other resolutions or optimizers, for messages.
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    image_sizes: range = SCALES
    takes_muon: bool = False
    needs: str = ""


_AIRBENCH, _LENET = "image_classifier.model.airbench:Airbench", "image_classifier.model.lenet:LeNet"
NETWORKS = {
    "airbench": Network(_AIRBENCH, takes_muon=True),
    "airbench_large": Network(_AIRBENCH, {"widths": (128, 384, 384)}, takes_muon=True),
    "airbench_small": Network(_AIRBENCH, {"widths": (32, 64, 128)}, takes_muon=True),
    "lenet": Network(
        _LENET,
        image_sizes=range(32, 33),
        needs="has no normalisation and linear layers for one size: it takes --optimizer sgd and --image_sizes 32, as "
        "--recipe notebook has them for --image_size 32",
    ),
    "resnet": Network("image_classifier.model.resnet:ResNet"),
    "resnet18": Network("image_classifier.model.residual:ResNet18"),
    "resnet18_imagenet": Network("image_classifier.model.residual:ResNet18", {"has_imagenet_stem": True}),
    "wide_resnet_16_4": Network("image_classifier.model.residual:WideResNet"),
}
"""Built-in networks. A new network needs a file and an entry here."""

PLUGGABLE: tuple[Kind, ...] = ("model", "optimizer")
"""Settings that may name a plug-in."""

OWN: dict[Kind, tuple[str, ...]] = {
    "model": tuple(NETWORKS),
    "optimizer": ("sgd", "muon"),
    "source": (),
    "workflow": ("classification",),
}
"""Built-in names by kind, which plug-ins cannot replace."""

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_SOURCES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".json", ".toml", ".yaml", ".yml"}
"""Suffixes of files that belong to a plug-in's code; compiled files differ between systems and are left out."""

Error = TypeVar("Error", bound=ImageClassifierError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlugIn:
    """Identity of a plug-in's code, in records and model files.

    Attributes:
        name: name in the settings.
        target: module:attribute.
        digest: sha256 over names and contents of the source files of its top-level package or module.
        distribution: installed distribution that contains it; None if there is none.
        version: of the distribution.
    """

    name: str
    target: str
    digest: str
    distribution: str | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert it to JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.target} ({self.distribution} {self.version})" if self.distribution else self.target


def restore_plugin(recorded: Any) -> PlugIn:
    """Restore the identity of a plug-in from JSON types.

    Raises:
        ValueError: it is malformed.
    """
    check_form(recorded, {"name": str, "target": str, "digest": str})
    owner, version = recorded.get("distribution"), recorded.get("version")
    return PlugIn(
        recorded["name"], recorded["target"], recorded["digest"], owner and str(owner), version and str(version)
    )


def is_own(kind: Kind, name: str) -> bool:
    """Return whether a name is built in."""
    return name in OWN[kind]


def is_target(name: object) -> bool:
    """Return whether a name has the form module:attribute."""
    return isinstance(name, str) and len(name) <= 200 and _TARGET.fullmatch(name) is not None


def describe_names(kind: Kind) -> str:
    """List the names that a setting accepts, for a message."""
    return ", ".join((*OWN[kind], *sorted(_list_registered(kind).keys() - set(OWN[kind])), "module:attribute"))


def check_name(kind: Kind, name: str) -> None:
    """Check that a name is built in, registered by an installed package, or a module:attribute.

    Nothing is imported.

    Raises:
        SettingsError: it is none of these, or several packages register it.
    """
    if is_own(kind, name) or is_target(name):
        return
    registered = _list_registered(kind)
    if name in registered:
        if len(registered[name]) > 1:
            targets = " and ".join(entry.value for entry in registered[name])
            raise SettingsError(
                f"{_name(kind, name)}: more than one installed package registers it; name one of {targets} instead"
            )
        return
    known = [*OWN[kind], *registered]
    meant = get_close_matches(name.lower().replace("-", "_"), known, n=1)
    question = f" (did you mean {meant[0]}?)" if meant else ""
    shown = quote_unprintable(name)[:100]
    raise SettingsError(
        f"{_name(kind)} takes one of {', '.join(known)}, or module:attribute of a package of yours, "
        f"got: {shown}{question}"
    )


def find_target(kind: Kind, name: str) -> str:
    """Find the module:attribute of a plug-in.

    Raises:
        SettingsError: no installed package, or more than one, registers the name.
    """
    if is_target(name):
        return name
    check_name(kind, name)
    return _list_registered(kind)[name][0].value


def _list_registered(kind: Kind) -> dict[str, list[EntryPoint]]:
    """List the entry points of installed packages, by name."""
    registered: dict[str, list[EntryPoint]] = {}
    for entry in _read_entry_points(GROUPS[kind], tuple(sys.path)):
        others = registered.setdefault(entry.name, [])
        if entry.value not in [other.value for other in others]:
            others.append(entry)
    return registered


@cache
def _read_entry_points(group: str, places: tuple[str, ...]) -> list[EntryPoint]:
    """Read the entry points of the packages in these places; cached, because each package has a file to read."""
    return list(entry_points(group=group))


def list_registered(kind: Kind) -> list[str]:
    """List the names that installed packages register."""
    return sorted(_list_registered(kind))


def check_allowed(kind: Kind, name: str, file: Path, error: type[Error], given: str | None = None) -> None:
    """Check that a plug-in that a file names may be imported: the file may be untrusted, and importing runs code.

    It may if it is built in, if an installed package registers it, if the user gave the same name, or if the variable
    `ALLOWED` lists it.

    Args:
        file: for messages.
        error: type of the exception that is raised otherwise.
        given: name that the user gave.
    """
    if is_own(kind, name) or name == given:
        return
    registered = _list_registered(kind)
    if name in registered:
        return
    if not is_target(name):
        noun = "a network" if kind == "model" else f"an {kind}"
        known = ", ".join((*OWN[kind], *registered))
        raise error(
            f"{file} holds {noun} called {name[:100]!r}; this version knows {known}; install the package "
            "that registers it"
        )
    if name in (entry.value for entries in registered.values() for entry in entries):
        return
    if name not in os.environ.get(ALLOWED, "").split():
        raise error(
            f"{file} names {name}, code that would be imported; if you trust it, install a package that registers it, "
            f"or set {ALLOWED}={name}"
        )


def load(kind: Kind, name: str) -> Callable[..., Any]:
    """Import a plug-in.

    Raises:
        SettingsError: it cannot be found or imported, or is not callable.
    """
    target = find_target(kind, name)
    module_name, _, path = target.partition(":")
    title = _name(kind, name).removeprefix("--")  # a record may name it, too
    try:
        value: Any = importlib.import_module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # third-party code
        logger.debug("%s cannot be imported", target, exc_info=error)
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            remedy = "; install its package, or name the folder that holds it in PYTHONPATH"
        raise SettingsError(f"{title} cannot be imported: {explain(error)}{remedy}") from error
    if not callable(value):
        raise SettingsError(f"{title} is {type(value).__name__}, not a callable")
    called: Callable[..., Any] = value
    return called


def _name(kind: Kind, name: str = "") -> str:
    titles: dict[Kind, str] = {"source": "the data source", "workflow": "workflow"}
    return f"{titles.get(kind, f'--{kind}')} {name}".strip()


def explain(error: BaseException) -> str:
    """Describe an exception of third-party code on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


def describe(kind: Kind, name: str) -> PlugIn | None:
    """Return the identity of a plug-in's code; None if it is built in.

    Raises:
        SettingsError: it cannot be found, or has no source files.
    """
    if is_own(kind, name):
        return None
    target = find_target(kind, name)
    top = target.partition(":")[0].partition(".")[0]
    files = _list_files(top)
    if not files:
        raise SettingsError(f"{_name(kind, name)}: {top} has no source files; install it unpacked")
    owner, version = _find_distribution(kind, name, top)
    return PlugIn(name, target, _compute_digest(files), owner, version)


def _list_files(top: str) -> dict[str, Path]:
    """List the source files of a top-level package or module, by relative path."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return {}
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {Path(spec.origin).name: Path(spec.origin)} if spec.origin and Path(spec.origin).is_file() else {}
    return {
        path.relative_to(folder).as_posix(): path
        for folder in spec.submodule_search_locations
        for path in Path(folder).rglob("*")
        if path.suffix in _SOURCES and path.is_file()
    }


def _compute_digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _find_distribution(kind: Kind, name: str, top: str) -> tuple[str | None, str | None]:
    entries = _list_registered(kind).get(name, []) if not is_target(name) else []
    names: Iterable[str] = [entry.dist.name for entry in entries if entry.dist is not None]
    for owner in names or packages_distributions().get(top, []):
        try:
            return owner, distribution(owner).version
        except PackageNotFoundError:
            continue
    return None, None


def takes_image_size(model: str, size: int) -> bool:
    """Return whether a network supports a resolution in pixels."""
    return size in (NETWORKS[model].image_sizes if model in NETWORKS else SCALES)
