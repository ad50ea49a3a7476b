"""What makes two trainings give the same bits: threads, algorithms, instruction set, precision, engine.

Free of torch at import, because an instruction set can only be capped before torch is first imported.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys

from image_classifier.config import Engine, InstructionSet, TrainingSettings
from image_classifier.errors import SettingsError

logger = logging.getLogger(__name__)

CAPS: dict[InstructionSet, dict[str, str]] = {
    "native": {},
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


def cap_instruction_set(instruction_set: InstructionSet) -> None:
    """Cap what torch's libraries use, through the environment; call it before anything imports torch.

    Raises:
        SettingsError: torch was imported before with another cap, so this one would not hold.
    """
    variables = {name for cap in CAPS.values() for name in cap}
    wanted = CAPS[instruction_set]
    if all(os.environ.get(name) == wanted.get(name) for name in variables):
        return
    if "torch" in sys.modules:
        raise SettingsError(
            f"--instruction_set {instruction_set} cannot be set once torch is imported; start a new process, or set "
            + " ".join(f"{name}={wanted.get(name, '')}" for name in sorted(variables))
            + " before"
        )
    for name in variables:
        os.environ.pop(name, None)
    os.environ.update(wanted)


def resolve_settings(settings: TrainingSettings) -> TrainingSettings:
    """Replace every `auto` by what this machine has, so that the record says what was really used.

    Raises:
        SettingsError: the device, the instruction set or the compiler that was asked for is not there.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise SettingsError("--device cuda: torch sees no GPU here; choose cpu, or auto")
    device = settings.device if settings.device != "auto" else "cuda" if has_gpu else "cpu"
    available = get_instruction_set()
    if settings.instruction_set != "native" and _RANK[available] < _RANK[settings.instruction_set]:
        raise SettingsError(f"--instruction_set {settings.instruction_set}: this machine has {available} only")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or available in ("avx512_bf16", "amx_bf16") else "fp32"
    num_threads = settings.num_threads or len(os.sched_getaffinity(0))
    resolved = dataclasses.replace(settings, device=device, precision=precision, num_threads=num_threads)
    return dataclasses.replace(resolved, engine=_resolve_engine(resolved))


def _resolve_engine(settings: TrainingSettings) -> Engine:
    if settings.engine == "eager" or (settings.engine == "auto" and settings.device != "cpu"):
        return "eager"
    if settings.device != "cpu":
        raise SettingsError(
            "--engine compiled has kernels for the CPU alone, got: --device cuda; choose --engine eager"
        )
    from image_classifier.training.kernels import load_kernels

    try:
        load_kernels()
    except SettingsError as error:
        if settings.engine == "compiled":
            raise
        logger.warning(
            "steps are computed eagerly, which is slower: %s", str(error).removeprefix("--engine compiled: ")
        )
        return "eager"
    return "compiled"


def get_compiler_name() -> str:
    """Name the C compiler that the kernels of steps are compiled with."""
    return os.environ.get("CC", "gcc")


def find_compiler() -> str | None:
    """Find the C compiler and say which version it is; None without one."""
    program = shutil.which(get_compiler_name())
    if program is None:
        return None
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0] or None


_RANK = {"default": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx_bf16": 4}


def get_instruction_set() -> str:
    """Name the highest instruction set that torch's libraries use here, caps included."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability != "avx512":
        return capability if capability in _RANK else "default"
    features = torch.cpu.get_capabilities()
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if features.get("amx_bf16") and cap is None:
        return "amx_bf16"
    return "avx512_bf16" if features.get("avx512_bf16") and cap in (None, "AVX512_CORE_BF16") else "avx512"


def configure_torch(settings: TrainingSettings) -> None:
    """Set torch's threads and algorithms for the whole process; settings must be resolved.

    Deterministic algorithms make torch raise where it has none, instead of giving other bits (PyTorch notes,
    Reproducibility).
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_num_threads(settings.num_threads)
    # Sets the same flag as use_deterministic_algorithms, which would import the compiler first: 1.2 s.
    torch.set_deterministic_debug_mode("error" if settings.deterministic else "default")
    # It would fill each new tensor, 7 % of the time; no operation here reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    torch.backends.cudnn.deterministic = settings.deterministic
    torch.backends.cudnn.benchmark = not settings.deterministic
