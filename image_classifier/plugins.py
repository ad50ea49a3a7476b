"""Finds networks, optimizers and data sources by name, from this and other packages.

Free of torch: names are checked with the settings, and code is imported by the stage that needs it.
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
"""What a plug-in is: the setting that names it, a source of data, which is asked, or a class that a workflow names."""

GROUPS: dict[Kind, str] = {
    "model": "image_classifier.networks",
    "optimizer": "image_classifier.optimizers",
    "source": "image_classifier.sources",
    "workflow": "image_classifier.workflows",
}
"""The groups of entry points that are looked up."""

ALLOWED = "IMAGE_CLASSIFIER_PLUGINS"
"""Variable with the plug-ins, separated by spaces, that may be imported because a file names them."""

SCALES = range(16, 225)
"""Sides in pixels that a step may scale images to, and that a network may take."""


@dataclass(frozen=True)
class Network:
    """A network of the package's own.

    Attributes:
        target: what builds it for a number of classes, as module:attribute.
        options: of what builds it.
        image_sizes: sides in pixels of the images that it takes.
        takes_muon: whether Muon has rates for it.
        needs: why it takes no other image sizes or optimizers, and which it takes.
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
"""The catalogue. A new network is a file of its own and an entry here."""

PLUGGABLE: tuple[Kind, ...] = ("model", "optimizer")
"""The settings that may name a plug-in."""

OWN: dict[Kind, tuple[str, ...]] = {
    "model": tuple(NETWORKS),
    "optimizer": ("sgd", "muon"),
    "source": (),
    "workflow": ("classification",),
}
"""The package's own by kind; no plug-in takes the place of one."""

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_SOURCES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".json", ".toml", ".yaml", ".yml"}
"""Endings of the files that may decide what a plug-in computes; what is compiled differs from system to system."""

Error = TypeVar("Error", bound=ImageClassifierError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlugIn:
    """Which code a plug-in is, as records and model files have it.

    Attributes:
        name: what it was asked for by.
        target: its module:attribute.
        digest: sha256 over names and contents of the source files of its top-level package or module.
        distribution: what installed it, with the version; None where nothing did.
    """

    name: str
    target: str
    digest: str
    distribution: str | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.target} ({self.distribution} {self.version})" if self.distribution else self.target


def restore_plugin(recorded: Any) -> PlugIn:
    """Restore the description of a plug-in.

    Raises:
        ValueError: it is none.
    """
    check_form(recorded, {"name": str, "target": str, "digest": str})
    owner, version = recorded.get("distribution"), recorded.get("version")
    return PlugIn(
        recorded["name"], recorded["target"], recorded["digest"], owner and str(owner), version and str(version)
    )


def is_own(kind: Kind, name: str) -> bool:
    """Say whether a name is one of the package's own."""
    return name in OWN[kind]


def is_target(name: object) -> bool:
    """Say whether a name has the form module:attribute."""
    return isinstance(name, str) and len(name) <= 200 and _TARGET.fullmatch(name) is not None


def describe_names(kind: Kind) -> str:
    """Describe the names that a setting takes."""
    return ", ".join((*OWN[kind], *sorted(_list_registered(kind).keys() - set(OWN[kind])), "module:attribute"))


def check_name(kind: Kind, name: str) -> None:
    """Check that a name is one of the package's own, one that an installed package registers, or a module:attribute.

    Nothing is imported.

    Raises:
        SettingsError: it is none of them, or more than one package registers it.
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
        SettingsError: no installed package registers the name, or more than one does.
    """
    if is_target(name):
        return name
    check_name(kind, name)
    return _list_registered(kind)[name][0].value


def _list_registered(kind: Kind) -> dict[str, list[EntryPoint]]:
    """List what installed packages register, by name."""
    registered: dict[str, list[EntryPoint]] = {}
    for entry in _read_entry_points(GROUPS[kind], tuple(sys.path)):
        others = registered.setdefault(entry.name, [])
        if entry.value not in [other.value for other in others]:
            others.append(entry)
    return registered


@cache
def _read_entry_points(group: str, places: tuple[str, ...]) -> list[EntryPoint]:
    """Read the entry points of the packages in these places: once, for each has a file to be read."""
    return list(entry_points(group=group))


def list_registered(kind: Kind) -> list[str]:
    """List the names that installed packages register."""
    return sorted(_list_registered(kind))


def check_allowed(kind: Kind, name: str, file: Path, error: type[Error], given: str | None = None) -> None:
    """Check that what a file names may be imported: the file may come from a stranger, and importing runs code.

    It may if it is the package's own, if an installed package registers it, if the user gave the same name, or if
    `ALLOWED` in the environment lists it.

    Args:
        error: is raised otherwise.
        given: what the user named.
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
        SettingsError: it cannot be found or imported, or is nothing that can be called.
    """
    target = find_target(kind, name)
    module_name, _, path = target.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # it is somebody's code
        logger.debug("%s cannot be imported", target, exc_info=error)
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            remedy = "; install its package, or name the folder that holds it in PYTHONPATH"
        raise SettingsError(f"{_name(kind, name)} cannot be imported: {explain(error)}{remedy}") from error
    if not callable(value):
        raise SettingsError(f"{_name(kind, name)} is {type(value).__name__}, nothing that can be called")
    called: Callable[..., Any] = value
    return called


def _name(kind: Kind, name: str = "") -> str:
    titles: dict[Kind, str] = {"source": "the data source", "workflow": "workflow"}
    return f"{titles.get(kind, f'--{kind}')} {name}".strip()


def explain(error: BaseException) -> str:
    """Explain in one line what somebody's code raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")


def describe(kind: Kind, name: str) -> PlugIn | None:
    """Describe which code a plug-in is; None for one of the package's own.

    Raises:
        SettingsError: it cannot be found, or not as files.
    """
    if is_own(kind, name):
        return None
    target = find_target(kind, name)
    top = target.partition(":")[0].partition(".")[0]
    files = _list_files(top)
    if not files:
        raise SettingsError(f"{_name(kind, name)}: the source files of {top} are not found; install it as files")
    owner, version = _find_distribution(kind, name, top)
    return PlugIn(name, target, _compute_digest(files), owner, version)


def _list_files(top: str) -> dict[str, Path]:
    """List the files of a top-level package or module that may decide what it computes, by relative path."""
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
    """Say whether a network takes images of this side in pixels."""
    return size in (NETWORKS[model].image_sizes if model in NETWORKS else SCALES)
