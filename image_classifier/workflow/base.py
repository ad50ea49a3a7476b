"""The base class of workflows, with one method per step. Free of torch and of Metaflow."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from image_classifier.errors import SettingsError
from image_classifier.plugins import explain, is_own, load

if TYPE_CHECKING:
    from image_classifier.experiment import RunResult
    from image_classifier.settings import RunSettings

Figure = float | int | str
"""What an evaluation says; plain, as Metaflow keeps it."""


@dataclass(frozen=True, kw_only=True)
class Workflow(ABC):
    """The steps of a workflow. Each is computed in a process of its own, and again after an interruption.

    The fields of a subclass, if it is a dataclass too, are what `settings` in the file may say.

    Attributes:
        training: options of the trainer that the file gives, by name.
    """

    training: Mapping[str, Any]

    def check(self) -> None:
        """Check before the flow starts that all is there which a step needs later.

        Raises:
            SettingsError: something is missing.
        """

    @abstractmethod
    def load_data(self) -> Path:
        """Return the data set, as --dataset_folder takes it; fetch or write it first where it is not there."""

    @abstractmethod
    def train(self, settings: RunSettings, **how: Any) -> RunResult:
        """Train a run into its folder, or go on with it where `settings.resume` says so. Trials are trained so, too.

        Args:
            how: what `experiment.run` takes: snapshot, reporter, should_stop and command.
        """

    @abstractmethod
    def evaluate(self, run: Path) -> Mapping[str, Figure]:
        """Return the figures of a finished run, by name."""

    @abstractmethod
    def save(self, run: Path) -> Path:
        """Save a finished run for others, and return where; what lies there of an interrupted attempt is replaced."""


Class = TypeVar("Class", bound=type[Workflow])

_REGISTERED: dict[str, type[Workflow]] = {}


def register(name: str) -> Callable[[Class], Class]:
    """Register a class under a name that files may use which import its module.

    Raises:
        SettingsError: another class has the name.
    """

    def decorate(workflow: Class) -> Class:
        known = _REGISTERED.get(name)
        if is_own("workflow", name) or (known is not None and _locate(known) != _locate(workflow)):
            raise SettingsError(f"workflow {name!a} is registered already; choose another name")
        _REGISTERED[name] = workflow
        return workflow

    return decorate


def _locate(workflow: type[Workflow]) -> tuple[str, str]:
    return workflow.__module__, workflow.__qualname__


def find_workflow(name: str, module: str | None = None) -> type[Workflow]:
    """Find the class that is registered under a name, by the decorator or an entry point, or is named module:attribute.

    Args:
        module: is imported first, for the names that it registers.

    Raises:
        SettingsError: it cannot be found or imported, is no `Workflow`, or lacks a method.
    """
    if module is not None:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # it is somebody's code
            raise SettingsError(f"import: {module} cannot be imported: {explain(error)}") from error
    target = "image_classifier.workflow.classification:Classification" if is_own("workflow", name) else name
    try:
        found: Any = _REGISTERED.get(name) or load("workflow", target)
    except SettingsError as error:
        known = f"; {module} registers {', '.join(_REGISTERED) or 'none'}" if module is not None else ""
        raise SettingsError(f"{error}{known}") from error
    if not (inspect.isclass(found) and issubclass(found, Workflow)):
        raise SettingsError(f"workflow {name} is not a class derived from image_classifier.workflow.base.Workflow")
    lacking = sorted(found.__abstractmethods__)
    if lacking:
        raise SettingsError(f"workflow {name} lacks {', '.join(lacking)}: define it, or derive from Classification")
    return found
