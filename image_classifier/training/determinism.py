"""Settings that make training bit-reproducible: shards, algorithms, instruction set, precision, engine.

Free of torch at import, because an instruction set can only be capped before torch is first imported.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from image_classifier.choices import CHOICES, InstructionSet
from image_classifier.errors import SettingsError
from image_classifier.kernels.library import load_kernels
from image_classifier.settings import TrainingSettings, restore_training_settings

logger = logging.getLogger(__name__)

CAPS: dict[InstructionSet, dict[str, str]] = {
    "native": {},
    "portable": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "COMPATIBLE"},
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_CBWR": "COMPATIBLE",
    },
}
"""The variables that cap each library: ATen's own kernels, oneDNN, MKL.

MKL chooses its code by the processor's vendor, and COMPATIBLE is its only branch that all vendors share (oneMKL
Developer Guide, Conditional Numerical Reproducibility).
"""


_CAPPING = {name for cap in CAPS.values() for name in cap}
_OF_ARITHMETIC = re.compile(
    "(ATEN|DNNL|MKL|ONEDNN|TORCH_MKLDNN)_(?!.*(NUM_THREADS|DYNAMIC|VERBOSE|THREADING_LAYER|INTERFACE_LAYER))"
    "|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)
"""Variables by which torch's libraries choose their code, old names and undocumented ones included."""
_READ_AT_START = {"GLIBC_TUNABLES": "glibc.cpu", "NPY_DISABLE_CPU_FEATURES": "", "NPY_ENABLE_CPU_FEATURES": ""}
"""Variables that choose code when a process starts, and what they must hold for that."""


def cap_instruction_set(instruction_set: InstructionSet) -> None:
    """Cap what torch's libraries use, through the environment; call it before anything imports torch.

    Other variables that choose the libraries' code are taken out, with a warning: no record would have them.

    Raises:
        SettingsError: torch was imported before with another cap, so this one would not hold; or a variable chose code
            when the process started.
    """
    if instruction_set == "portable":  # nothing of what the variables choose has a part in it
        return
    for name, part in _READ_AT_START.items():
        if part in os.environ.get(name, "") and os.environ.get(name):
            raise SettingsError(
                f"{name} changes results but is not recorded; unset it, or use --instruction_set instead"
            )
    wanted = CAPS[instruction_set]
    present = {name: value for name, value in os.environ.items() if _OF_ARITHMETIC.match(name)}
    if present == wanted:
        return
    if "torch" in sys.modules:
        words = [f"{name}={wanted.get(name, '')}" for name in sorted(present.keys() | wanted.keys())]
        raise SettingsError(
            f"--instruction_set {instruction_set} cannot be set once torch is imported; start a new process, or set "
            f"{' '.join(words)} before"
        )
    for name in present.keys() - wanted.keys():
        if name not in _CAPPING:
            logger.warning("%s was removed from the environment: it changes results but is not recorded", name)
        del os.environ[name]
    os.environ.update(wanted)


def build_capped_environment(instruction_set: InstructionSet) -> dict[str, str]:
    """Build the environment in which a new process has this cap and nothing else that chooses the libraries' code."""
    others = {name: value for name, value in os.environ.items() if not _OF_ARITHMETIC.match(name)}
    return {**others, **CAPS[instruction_set]}


@dataclass(frozen=True)
class Lack:
    """A setting with a value that this machine does not have or this version does not know, and the nearest to it."""

    setting: str
    asked: Any
    nearest: Any
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.setting} was {self.asked!s:.50}: {self.reason}"

    def describe_replacement(self) -> str:
        """Say what takes the place of what."""
        return f"{self.setting} {self.nearest} instead of {self.asked!s:.50}: {self.reason}"


_NEAREST = {"device": "cpu", "precision": "fp32", "engine": "eager", "instruction_set": "native"}
"""What takes the place of a name that this version does not know."""


def restore_nearest_settings(recorded: Mapping[str, Any]) -> tuple[TrainingSettings, list[Lack]]:
    """Make settings out of a run's record as `restore_training_settings` does, but with the nearest of what is unknown
    here or above this processor; call it before anything imports torch, and cap what it gives.

    Raises:
        SettingsError: the record has other settings that this version does not know.
    """
    lacks = []
    for name, nearest in _NEAREST.items():
        known = get_args(CHOICES[name])
        if name in recorded and recorded[name] not in known:
            names = ", ".join(choice for choice in known if choice != "auto")
            lacks.append(Lack(name, recorded[name], nearest, f"this version knows {names}"))
    settings = restore_training_settings({**recorded, **{lack.setting: lack.nearest for lack in lacks}})
    features = set(read_processor().get("flags", "").split())
    available = [name for name in ("avx2", "avx512", "avx512_bf16") if features >= _FEATURES[name]]
    lack = _find_lacking_instruction_set(settings, (available or ["default"])[-1])
    if features and lack is not None:
        settings = replace(settings, instruction_set=lack.nearest)
        lacks.append(lack)
    return settings, lacks


def resolve_settings(settings: TrainingSettings) -> TrainingSettings:
    """Replace every `auto` by what this machine has, so that the record says what was really used.

    Raises:
        SettingsError: the device, the instruction set or the kernels that were asked for are not there.
    """
    resolved, lacks = resolve_nearest_settings(settings)
    for lack in lacks:
        raise SettingsError(f"--{lack.setting} {lack.asked}: {lack.reason}{lack.remedy}")
    return resolved


def resolve_nearest_settings(settings: TrainingSettings) -> tuple[TrainingSettings, list[Lack]]:
    """Resolve settings as `resolve_settings` does, but to the nearest of what is not there; return what that is, too.

    Raises:
        SettingsError: the settings do not go together.
    """
    import torch

    is_portable = settings.instruction_set == "portable"
    has_gpu, available = torch.cuda.is_available(), get_instruction_set()
    if settings.device == "auto":
        settings = replace(settings, device="cuda" if has_gpu else "cpu")
    lacks = []
    if settings.device == "cuda" and not has_gpu:
        lacks.append(Lack("device", "cuda", "cpu", "torch sees no GPU here", "; choose cpu, or auto"))
    if lack := _find_lacking_instruction_set(settings, available):
        lacks.append(lack)
    settings = replace(settings, **{lack.setting: lack.nearest for lack in lacks})
    # A GPU computes a batch in one pass.
    settings = replace(settings, shards=1 if settings.device == "cuda" else settings.count_shards())

    if settings.engine == "compiled" and settings.device != "cpu":
        raise SettingsError("--engine compiled needs --device cpu, got: --device cuda; choose --engine eager")
    if settings.precision == "auto":
        has_bf16 = settings.device == "cuda" or (available in ("avx512_bf16", "amx_bf16") and not is_portable)
        settings = replace(settings, precision="bf16" if has_bf16 else "fp32")
    if settings.engine != "eager":
        obstacle = _find_obstacle_to_kernels(settings) if settings.device == "cpu" else None
        if obstacle and is_portable:
            lacks.append(Lack("instruction_set", "portable", "native", obstacle, "; or choose native"))
            return resolve_nearest_settings(replace(settings, instruction_set="native"))[0], lacks
        if obstacle and settings.engine == "compiled":
            lacks.append(Lack("engine", "compiled", "eager", obstacle, "; or choose --engine eager"))
        elif obstacle:
            logger.warning("steps are computed eagerly, which is slower: %s", obstacle)
        settings = replace(settings, engine="eager" if obstacle or settings.device != "cpu" else "compiled")
    return settings, lacks


def _find_lacking_instruction_set(settings: TrainingSettings, available: str) -> Lack | None:
    asked = settings.instruction_set
    if asked in ("native", "portable") or _RANK[available] >= _RANK[asked]:
        return None
    nearest = available if available in CAPS else "native"
    return Lack("instruction_set", asked, nearest, f"this machine has {available} only", "; choose native")


def _find_obstacle_to_kernels(settings: TrainingSettings) -> str | None:
    """Say why there are no kernels to compute with; nothing where there are."""
    try:
        load_kernels(choose_kernels(settings.instruction_set))
    except SettingsError as error:
        return str(error)
    return None


_RANK = {"default": 0, "neon": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx_bf16": 4}
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
_FEATURES = {"avx2": {"avx2", "fma"}, "avx512": _AVX512, "avx512_bf16": _AVX512 | {"avx512_bf16"}}
"""What the kernel calls the features that each instruction set needs."""


def read_processor() -> dict[str, str]:
    """Read what the kernel tells of the first processor; nothing where it tells nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


FORCE_KERNELS = "IMAGE_CLASSIFIER_KERNELS"
"""Variable that names the kernels of a portable run, where it is to be computed as on a lesser processor; no bit of it
changes."""


def choose_kernels(instruction_set: str) -> str:
    """Name the instruction set of the kernels that a run with this setting is computed with here.

    Raises:
        SettingsError: a portable run cannot be computed on this processor, or not by the kernels that are forced.
    """
    if instruction_set != "portable":
        return get_instruction_set()
    available = list_portable_kernels()
    forced = os.environ.get(FORCE_KERNELS) or (available or ["none"])[-1]
    if forced not in available:
        needs = f"has no kernels for {forced}" if available else "has neither AVX2 with FMA nor is it of aarch64"
        raise SettingsError(f"this processor {needs}; portable runs need one of avx2, avx512 and neon")
    return forced


def list_portable_kernels() -> list[str]:
    """List the instruction sets of this processor that portable runs can be computed with, the fastest last."""
    features = set(read_processor().get("flags", "").split())
    return ["neon"] if is_arm() else [name for name in ("avx2", "avx512") if features >= _FEATURES[name]]


def is_arm() -> bool:
    """Say whether the processor is of aarch64."""
    return platform.machine().lower() in ("aarch64", "arm64")


def get_instruction_set() -> str:
    """Name the highest instruction set that torch's libraries use here, caps included."""
    import torch

    if is_arm():
        return "neon"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "avx512":
        return capability if capability in _RANK else "default"
    features = torch.cpu.get_capabilities()
    if not features.get("avx512_f"):  # the capability is the cap's, whatever the processor has
        return "avx2" if features.get("avx2") else "default"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if features.get("amx_bf16") and cap is None:
        return "amx_bf16"
    return "avx512_bf16" if features.get("avx512_bf16") and cap in (None, "AVX512_CORE_BF16") else "avx512"


def configure_torch() -> None:
    """Set torch's algorithms for the whole process.

    Deterministic algorithms make torch raise where it has none, instead of giving other bits (PyTorch notes,
    Reproducibility).
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # Sets the same flag as use_deterministic_algorithms, which would import the compiler first: 1.2 s.
    torch.set_deterministic_debug_mode("error")
    # It would fill each new tensor, 7 % of the time; no operation here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
