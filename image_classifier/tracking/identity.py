"""The identity of a run: code, environment and machine class; and the digest of a state of tensors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

import image_classifier
from image_classifier.kernels.library import get_kernels_digest, get_source_digest
from image_classifier.settings import TrainingSettings
from image_classifier.storage import compute_file_digest
from image_classifier.tracking.environment import DISTRIBUTION, find_lock
from image_classifier.training.determinism import get_instruction_set, read_processor

PACKAGE_FOLDER = Path(image_classifier.__file__).parent
SOURCES = {".c", ".h", ".py", ".yaml"}


def describe_code() -> dict[str, Any]:
    """Describe this package's code: version, digest over its source files, and for people the commit."""
    return {
        "version": image_classifier.__version__,
        "digest": compute_code_digest(PACKAGE_FOLDER),
        **_describe_commit(PACKAGE_FOLDER),
    }


def compute_code_digest(folder: Path) -> str:
    """Compute a sha256 over names and contents of the source files: the same in a clone and in a wheel."""
    paths = [path for path in folder.rglob("*") if path.suffix in SOURCES]
    return compute_sources_digest({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


def compute_sources_digest(files: Mapping[str, bytes]) -> str:
    """Compute the same over files that are in memory, by name."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _describe_commit(folder: Path) -> dict[str, Any]:
    def ask_git(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if ask_git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed, perhaps inside another checkout
        revision = os.environ.get("IMAGE_CLASSIFIER_REVISION")  # a container image says what it was built from
        commit, dirty, _ = (revision or "").partition("-dirty")
        return {"commit": commit or None, "uncommitted_changes": bool(dirty) if commit else None}
    return {"commit": ask_git("rev-parse", "HEAD"), "uncommitted_changes": bool(ask_git("status", "--porcelain", "."))}


def describe_environment(plugins: Iterable[str] = ()) -> dict[str, Any]:
    """Describe the Python and the distributions that the base install needs, found through their metadata.

    Args:
        plugins: distributions of plug-ins, which belong to it with what they need.
    """
    versions: dict[str, str] = {}
    pending = [DISTRIBUTION, *plugins]
    while pending:
        name = pending.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # a requirement for another platform, or not installed
            continue
        if name in versions:
            continue
        versions[name] = distribution.version
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name.lower().replace("_", "-").replace(".", "-"))
    versions.pop(DISTRIBUTION, None)  # its code has a digest of its own
    python = ".".join(platform.python_version_tuple()[:2])
    lock = find_lock()
    return {
        "python": python,
        "distributions": dict(sorted(versions.items())),
        "digest": compute_json_digest([python, sorted(versions.items())]),
        "lock_digest": compute_file_digest(lock) if lock else None,
    }


def describe_machine(settings: TrainingSettings) -> dict[str, Any]:
    """Describe the machine's class: what must be equal for two trainings to give equal bits; settings resolved.

    Under a cap on the instruction set the processor's family is left out: that is what the cap is for. A portable run
    depends on the kernels alone.
    """
    if settings.instruction_set == "portable":
        portable = {"instruction_set": "portable", "kernels": get_source_digest()}
        return {"class": portable, "digest": compute_json_digest(portable)}
    capped = settings.instruction_set != "native"
    machine_class: dict[str, Any] = {
        "architecture": platform.machine(),
        "processor": "any" if capped else describe_processor(),
        "instruction_set": settings.instruction_set if capped else get_instruction_set(),
        "torch": torch.__version__,
        "torch_build": torch.version.git_version,
        "gpu": None,
    }
    if settings.engine == "compiled":
        machine_class["kernels"] = get_kernels_digest(get_instruction_set())
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine_class["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch ships it without types
        }
    return {"class": machine_class, "digest": compute_json_digest(machine_class)}


def describe_processor() -> str:
    """Name vendor, family and model, as the kernel tells them."""
    facts = read_processor()
    if not facts:
        return _ask_macos() or platform.processor() or "unknown"
    of_arm = ("CPU implementer", "CPU variant", "CPU part")
    keys = of_arm if of_arm[0] in facts else ("vendor_id", "cpu family", "model")
    return " ".join(facts.get(key, "?") for key in keys)


def describe_processor_family() -> str:
    """Name architecture, vendor and, on x86, family: what processors that compute alike have in common."""
    facts = read_processor()
    keys = ("CPU implementer",) if "CPU implementer" in facts else ("vendor_id", "cpu family")
    named = [facts[key] for key in keys if key in facts] or [describe_processor()]
    return " ".join([platform.machine(), *named])


def _ask_macos() -> str:
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def compute_json_digest(value: Any) -> str:
    """Compute the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def compute_tensor_digest(tensor: Tensor) -> str:
    """Compute the sha256 of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(raw.data)
    return digest.hexdigest()


def compute_tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Compute the digest of each tensor, by name."""
    return {name: compute_tensor_digest(tensor) for name, tensor in tensors.items()}


def compute_weights_digest(module: nn.Module) -> str:
    """Compute one digest over all weights and buffers of a module: over name, dtype, shape and bytes of each."""
    return compute_json_digest(compute_tensor_digests(module.state_dict()))


def find_differing_keys(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> Iterable[str]:
    """List the keys under which two descriptions differ, sorted."""
    return sorted(
        key for key in recorded.keys() | present.keys() if recorded.get(key, "absent") != present.get(key, "absent")
    )
