"""Kernels of our own for operations that torch is slow at: `kernels.c`, compiled on first use for this processor.

What they are for is said in torch's terms in `small_steps.py` and `large_steps.py`, so that every network is served: an
operation that is met with arguments that a kernel can take is computed by it, all others stay torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from image_classifier.errors import SettingsError, StorageError
from image_classifier.progress import track
from image_classifier.storage import find_cache, scratch_folder, write_atomically
from image_classifier.training.determinism import find_compiler, get_compiler_name, get_instruction_set

SOURCES = [
    Path(__file__).with_name(name) for name in ("kernels.c", "kernels_large.h", "kernels_tiles.h", "kernels_winograd.h")
]

_AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
FLAGS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx_bf16": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""The processors to compile for, by instruction set."""

KERNELS = (
    "convolve",
    "convolve_weights",
    "pool",
    "unpool",
    "rectify",
    "rectify_gradient",
    "multiply",
    "multiply_transposed",
    "sum_rows",
    "copy",
    "convert",
    "shift_channels",
    "log_softmax",
    "log_softmax_gradient",
    "likelihood",
    "likelihood_gradient",
    "find_largest",
    "compare",
    "count",
    *(
        f"{kernel}_{real}"
        for kernel in ("pool", "unpool", "gelu_gradient", "sum_channels", "scale_channels")
        for real in ("bf16", "float")
    ),
    "gelu_bf16",
    *(
        f"{kernel}_{real}"
        for real in ("float", "bf16")
        for kernel in ("transform_filters", "convolve_tiles", "correlate_tiles")
    ),
    "correlate_bf16",
)
"""As `kernels.c` numbers them; the last four need a processor that multiplies 16 bits, the very last AMX."""

Run = Callable[[Any, int], None]


def load_kernels() -> Run:
    """Compile the kernels if the user's cache does not have them yet, and load them.

    Returns:
        What runs a number of calls that stand one after the other in an array of 64-bit words.

    Raises:
        SettingsError: there is no compiler, or it cannot compile them.
        StorageError: they have no place to be compiled in.
    """
    return _load_kernels(find_compiler(), get_instruction_set())


@cache
def _load_kernels(compiler: str | None, instruction_set: str) -> Run:
    if compiler is None:
        raise SettingsError(f"there is no C compiler {get_compiler_name()}: install gcc, or name one in CC")
    # Without -fno-trapping-math, gcc takes no vectors where a choice depends on a comparison of floats.
    flags = ["-O3", "-fno-trapping-math", "-fPIC", *FLAGS.get(instruction_set, [])]
    digest = hashlib.sha256(
        "\0".join([compiler, *flags]).encode() + b"".join(source.read_bytes() for source in SOURCES)
    ).hexdigest()
    cache = find_cache()
    with ExitStack() as stack:
        path = cache and cache / "kernels" / f"{digest[:32]}.so"
        if path is None or not path.exists():
            path = _compile(flags, path, stack.enter_context(scratch_folder()) / "kernels.so")
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise SettingsError(
                f"{path} cannot be loaded ({error}); remove it, or name a folder in IMAGE_CLASSIFIER_CACHE from which "
                "programs may be run"
            ) from error
    run: Run = library.run
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.run.restype = None
    return run


@track("compiling kernels")
def _compile(flags: Sequence[str], path: Path | None, made: Path) -> Path:
    """Compile and move the result into the cache; return where it is, which is not there if the cache is read-only."""
    environment = os.environ | {"TMPDIR": str(made.parent)}
    parts = made.with_suffix(".o")
    # Linked without OpenMP's library: torch has loaded one, whose threads are to be the only ones.
    for command in (
        [*flags, "-fopenmp", "-c", str(SOURCES[0]), "-o", str(parts)],
        ["-shared", str(parts), "-o", str(made), "-lm"],
    ):
        answer = subprocess.run(
            [get_compiler_name(), *command], capture_output=True, text=True, check=False, env=environment
        )
        if answer.returncode != 0:
            reason = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[0]
            raise SettingsError(f"{get_compiler_name()} failed: {reason}")
    if path is None:
        return made
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, made.read_bytes())  # whoever else compiles at the same moment
    except (OSError, StorageError):
        return made
    return path
