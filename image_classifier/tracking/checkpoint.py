"""Model files and checkpoints: the only place that calls torch.save and torch.load, always with weights_only."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from image_classifier.choices import Fit, Views
from image_classifier.data.content import MAX_CLASSES
from image_classifier.data.pickles import PickleError
from image_classifier.errors import ModelError, RunError, StorageError
from image_classifier.files import read_file
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize, is_image_size
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import PlugIn, check_allowed, describe, is_own, restore_plugin, takes_image_size
from image_classifier.storage import (
    DISK,
    TEMPORARY_PREFIX,
    Disk,
    remove_folder,
    storage_error,
    write_atomically,
    write_folder_atomically,
)
from image_classifier.text import list_first, one_line
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.layout import MANIFEST
from image_classifier.tracking.reading import read_manifest
from image_classifier.tracking.tensor_file import MAX_BYTES, rebuild_tensor_file

FORMAT_VERSION = 2  # of a checkpoint: since 2 its frozen weights may lie in a file that all checkpoints share
_WHOLE_FORMAT_VERSION = 1
MODEL_FORMAT_VERSION = 3  # since 3 a model may take images of other sizes than the default
_DEFAULT_SIZE_FORMAT_VERSION = 2  # since 2 the airbench networks repeat the edges of their images
CHECKPOINT_PREFIX = "step-"
SET_ASIDE_PREFIX = "bad-"
FROZEN_PREFIX = "frozen-"

_FOLDER_NAME = re.compile(f"{CHECKPOINT_PREFIX}([0-9]{{8,}})")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model file, read and rebuilt.

    Attributes:
        name: of the network: in the catalogue, or of a plug-in.
        views: views of an image that its recipe averages.
        run: experiment, run and data digest that the weights come from.
        fit: how images of another size are fitted, as those were that it was trained on.
        input_size: side in pixels of the images that it takes; the classifier scales them to its own image_size.
        plugin: which code the network was when it was trained; None for one of the catalogue.
    """

    classifier: Classifier
    name: str
    classes: tuple[str, ...]
    views: Views
    run: dict[str, str]
    fit: Fit = "squeeze"
    input_size: ImageSize = DEFAULT_IMAGE_SIZE
    plugin: PlugIn | None = None

    def check_code(self, path: Path) -> None:
        """Check that the network's code is the one that was trained.

        Raises:
            ModelError: it is another.
        """
        present = describe("model", self.name)
        if self.plugin is not None and present is not None and present.digest != self.plugin.digest:
            raise ModelError(
                f"{path} was trained with {self.plugin}, code {self.plugin.digest[:12]}; here is {present}, code "
                f"{present.digest[:12]}: install the other, or train again"
            )


def serialize_model(model: Model) -> bytes:
    """Serialize a model with all that is needed to rebuild its network and feed it.

    One that takes images of the default size has the bytes, and the readers, that it always had.
    """
    has_default_size = model.input_size == DEFAULT_IMAGE_SIZE
    return _serialize(
        {
            "format_version": _DEFAULT_SIZE_FORMAT_VERSION if has_default_size else MODEL_FORMAT_VERSION,
            "model": model.name,
            "classes": list(model.classes),
            "views": model.views,
            "fit": model.fit,
            "image_size": model.classifier.image_size,
            **({} if has_default_size else {"input_size": model.input_size}),
            "run": model.run,
            **({"plugin": model.plugin.to_json()} if model.plugin else {}),
            "state": {
                name: tensor.detach().cpu().contiguous() for name, tensor in model.classifier.state_dict().items()
            },
        }
    )


def load_model(path: Path, named: str | None = None) -> Model:
    """Load a model file and rebuild its network on the CPU; one in a finished run is held against its manifest.

    The code of a network of another package is imported only if `check_allowed` allows it; where that is another than
    was trained, a warning says so.

    Args:
        named: the network that the user asked for.

    Raises:
        ModelError: the file is missing, changed, a Git LFS pointer, damaged, hostile, of a later format, or no model;
            or its network is not to be imported, or is not what it was.
        SettingsError: its network cannot be imported.
        RunError: the manifest beside it is damaged.
    """
    return parse_model(read_model_file(path), path, named)


def read_model_file(path: Path) -> bytes:
    """Read a file that should hold a model or weights.

    Raises:
        ModelError: it is missing, too large, or cannot be read.
    """
    if not path.is_file():
        raise ModelError(f"there is no model file {path}: name the model.pth of a finished run, or a file of weights")
    try:
        return read_file(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}; choose another model") from error


def parse_model(raw: bytes, path: Path, named: str | None = None) -> Model:
    """Rebuild a model from the content of its file, as `load_model` does."""
    content = _deserialize(raw, path, "model", MODEL_FORMAT_VERSION)
    if is_finished(path.parent):
        recorded = read_manifest(path.parent)["files"].get(path.name)
        if recorded is not None and recorded["sha256"] != hashlib.sha256(raw).hexdigest():
            raise ModelError(
                f"{path} was changed after its run: its content does not match {MANIFEST} in the same folder"
            )
    try:
        name, classes, state = str(content["model"]), tuple(content["classes"]), dict(content["state"])
        views, run = cast(Views, content["views"]), dict(content["run"])
        image_size = int(content.get("image_size", DEFAULT_IMAGE_SIZE))  # the first models had one size only
        input_size = content.get("input_size", DEFAULT_IMAGE_SIZE)
        fit = cast(Fit, content.get("fit", "squeeze"))  # and one way
        plugin = restore_plugin(content["plugin"]) if "plugin" in content else None
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a model of this package: its content has no valid {error}") from error
    check_allowed("model", name, path, ModelError, named)
    if content["format_version"] < 2 and name.startswith("airbench"):
        raise ModelError(
            f"{path} has the network {name} of image_classifier 0.1, which computes something else since then: "
            "train again, or use it with that version"
        )
    is_named = 0 < len(classes) <= MAX_CLASSES and all(isinstance(label, str) for label in classes)
    if not is_named or views not in get_args(Views) or fit not in get_args(Fit):
        raise ModelError(f"{path} is not a model of this package: its classes, its views or its fit are not valid")
    if not takes_image_size(name, image_size):
        raise ModelError(f"{path} is not a model of this package: its image_size is {image_size}")
    if not is_image_size(input_size):
        raise ModelError(f"{path} is not a model of this package: its input_size is {str(input_size)[:20]!a}")
    build = partial(
        build_classifier, name, len(classes), input_mean=(0, 0, 0), input_std=(1, 1, 1), seed=0, image_size=image_size
    )
    if is_own("model", name):
        with torch.device("meta"):  # without memory, for as many classes as the file says that there are
            check_state(build(), state, path)
    classifier = build()
    load_state(classifier, state, path)
    model = Model(classifier.eval(), name, classes, views, run, fit, input_size, plugin)
    try:
        model.check_code(path)
    except ModelError as error:
        logger.warning("%s; its predictions may differ from those of the run", error)
    return model


def load_state(classifier: Classifier, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state into a classifier.

    Raises:
        ModelError: as `check_state` says; nothing was copied.
    """
    check_state(classifier, state, path)
    classifier.load_state_dict(state)


def check_state(classifier: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Check that a state is one of a classifier or a network.

    Raises:
        ModelError: names or shapes differ; the message says which.
    """
    expected = classifier.state_dict()
    differences = [f"{name} is missing" for name in expected.keys() - state.keys()]
    unknown = (name if str(name).isprintable() else repr(name) for name in state.keys() - expected.keys())
    differences += [f"{name} is unknown" for name in unknown]
    for name in expected.keys() & state.keys():
        present, wanted = (_describe_tensor(tensors[name]) for tensors in (state, expected))
        if present != wanted:
            differences.append(f"{name} has the shape {present} instead of {wanted}")
    if differences:
        raise ModelError(f"{path} belongs to another architecture: {list_first(sorted(differences), 3, '; ')}")


def _describe_tensor(value: object) -> str:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return "none"
    kind = "" if value.dtype == torch.float32 else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{list(value.shape)}{kind}"


def load_tensors(raw: bytes, path: Path, kind: str) -> Any:
    """Load what torch.save wrote, as far as it is tensors and plain data.

    Args:
        path: the file's, for messages.
        kind: what it should be, likewise.

    Raises:
        ModelError: it is a Git LFS pointer, damaged or hostile.
    """
    if raw.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull --include {shlex.quote(str(path))}"
        )
    try:
        return torch.load(io.BytesIO(rebuild_tensor_file(raw)), map_location="cpu", weights_only=True)
    except PickleError as error:
        raise ModelError(f"{path} is not a {kind} file, or is damaged: it {error}") from error
    except Exception as error:  # what it raises for damaged files is documented nowhere, and of many types
        raise ModelError(f"{path} is not a {kind} file, or is damaged: {one_line(error)}") from error


def _deserialize(raw: bytes, path: Path, kind: str, latest: int) -> dict[str, Any]:
    content = load_tensors(raw, path, kind)
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise ModelError(f"{path} is not a {kind} file of this package: it has no format_version")
    if content["format_version"] > latest:
        raise ModelError(f"{path} has the format {content['format_version']}; this version reads up to {latest}")
    return content


def _serialize(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Checkpoints:
    """The checkpoints of one run: `checkpoints/step-00000500/` with `state.pth` and, written last, `manifest.json`.

    Weights that no step changes lie beside them in one file, `frozen-<sha256>.pth`, which each `state.pth` names.
    """

    def __init__(self, folder: Path, disk: Disk = DISK) -> None:
        self.folder = folder
        self.disk = disk

    def list_steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        matches = (_FOLDER_NAME.fullmatch(path.name) for path in self.folder.glob(f"{CHECKPOINT_PREFIX}*"))
        return sorted(int(match[1]) for match in matches if match)

    def get_path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"{CHECKPOINT_PREFIX}{step:08d}"

    def save(self, step: int, state: dict[str, Any], keep: int, frozen: Collection[str] = ()) -> None:
        """Save a checkpoint durably; then, once it was read back and verified, remove all but the newest `keep`.

        A step that has a checkpoint keeps it: it is the one that the run was resumed from.

        Args:
            frozen: names of the classifier's weights that no step changes.

        Raises:
            StorageError: the disk refused; the earlier checkpoints are as they were.
        """
        try:
            if not self.folder.is_dir():
                self.disk.make_folder(self.folder)
                self.disk.sync(self.folder.parent)
        except OSError as error:
            raise storage_error(self.folder, error) from error
        if frozen:
            state = self._share(state, frozen)
        version = FORMAT_VERSION if frozen else _WHOLE_FORMAT_VERSION
        content = _serialize({"format_version": version, "step": step, **state})
        if not self.get_path(step).exists():
            files = {"state.pth": content, "manifest.json": _build_manifest(content)}
            write_folder_atomically(self.get_path(step), files, self.disk)
        try:
            self._read(step)
            if frozen:
                self._read_frozen(state["frozen"])
        except ModelError as error:
            raise StorageError(
                f"data read back from the disk differs from what was written: {error}; check the disk"
            ) from error
        self.remove_old(keep)

    def remove_old(self, keep: int) -> None:
        """Remove all but the newest `keep`; call it when the newest was read.

        Raises:
            StorageError: the disk refused.
        """
        for step in self.list_steps()[:-keep]:
            remove_folder(self.get_path(step), self.disk)

    def load_newest(self, check: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole; set those that are not aside, with a warning.

        Args:
            check: raises a RunError where a state that is whole in itself cannot be gone on from.

        Returns None where there is none.

        Raises:
            StorageError: the disk refused to set one aside.
        """
        for step in reversed(self.list_steps()):
            try:
                state = self.load(step)
                check(state)
                return state
            except (ModelError, RunError) as error:
                self._set_aside(step, error)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Load a step's checkpoint after checking it against its manifest.

        Raises:
            ModelError: it is missing or damaged.
        """
        path = self.get_path(step) / "state.pth"
        content = _deserialize(self._read(step), path, "checkpoint", FORMAT_VERSION)
        return self._complete(content, path) if "frozen" in content else content

    def copy(self, step: int, folder: Path) -> None:
        """Copy a step's checkpoint into another folder of checkpoints."""
        shutil.copytree(self.get_path(step), folder / self.get_path(step).name)
        for path in self.folder.glob(f"{FROZEN_PREFIX}*"):
            shutil.copy(path, folder)

    def _share(self, state: dict[str, Any], frozen: Collection[str]) -> dict[str, Any]:
        """Write the frozen weights if they are not there; return the state with their file's sha256 instead."""
        weights = state["classifier"]
        kept = {name: tensor for name, tensor in weights.items() if name in frozen}
        content = _serialize({"format_version": FORMAT_VERSION, "classifier": kept})
        digest = hashlib.sha256(content).hexdigest()
        try:
            self._read_frozen(digest)
        except ModelError:
            write_atomically(self.folder / f"{FROZEN_PREFIX}{digest}.pth", content, self.disk)
        rest = {name: None if name in frozen else tensor for name, tensor in weights.items()}
        return {**state, "classifier": rest, "frozen": digest}

    def _complete(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Put the frozen weights back into a state."""
        frozen = _deserialize(self._read_frozen(state["frozen"]), path, "checkpoint", FORMAT_VERSION)
        try:
            weights = {
                name: frozen["classifier"][name] if tensor is None else tensor
                for name, tensor in state["classifier"].items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: it lacks frozen weights: {error}") from error
        return {**state, "classifier": weights}

    def _read_frozen(self, digest: object) -> bytes:
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ModelError(f"a checkpoint in {self.folder} is damaged: it names no frozen weights")
        path = self.folder / f"{FROZEN_PREFIX}{digest}.pth"
        content = read_model_file(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ModelError(f"{path} is damaged: its content is not what its name says")
        return content

    def remove_unfinished(self) -> None:
        """Remove what a killed process had begun to write or to remove.

        Raises:
            StorageError: the disk refused.
        """
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            try:
                self.disk.remove(path)
            except OSError as error:
                raise storage_error(path, error, "remove") from error

    def _read(self, step: int) -> bytes:
        folder = self.get_path(step)
        try:
            content, manifest = (read_file(folder / name, MAX_BYTES) for name in ("state.pth", "manifest.json"))
        except (OSError, ValueError) as error:
            raise ModelError(f"the checkpoint {folder} is damaged: {error}") from error
        if manifest != _build_manifest(content):
            raise ModelError(f"the checkpoint {folder} is damaged: its state does not match its manifest")
        return content

    def _set_aside(self, step: int, reason: Exception) -> None:
        path = self.get_path(step)
        aside = self.folder / f"{SET_ASIDE_PREFIX}{path.name}"
        logger.warning("%s; it was renamed to %s, and the previous checkpoint is used", reason, aside.name)
        try:
            self.disk.remove(aside)
            self.disk.rename(path, aside)
            self.disk.sync(self.folder)
        except OSError as error:
            raise storage_error(aside, error) from error


def _build_manifest(content: bytes) -> bytes:
    facts = {
        "format_version": _WHOLE_FORMAT_VERSION,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return json.dumps(facts).encode()
