"""Builds the kernels: one library for each instruction set, with the same compiler for every platform.

`setup.py` calls this when the wheel is built, or the package is installed from a clone. The compiler is Clang as the
package `ziglang` brings it, pinned in pyproject.toml: one version on every machine, which needs no other compiler and
makes the libraries of all platforms.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("small.c", "large.c", "elements.c")
HEADERS = ("amx.h", "kernels.h", "pixels.h", "products.h", "simd.h", "winograd.h")
LIBRARIES = "libraries.json"
"""Name, size and sha256 of each library, and the digest of what they were built from."""

_AVX512 = ("-mcpu=x86_64_v4", "-mprefer-vector-width=512")
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": ("-mcpu=x86_64_v3",),
        "avx512": _AVX512,
        "avx512_bf16": ("-mcpu=x86_64_v4+avx512bf16", *_AVX512[1:]),
        "amx_bf16": ("-mcpu=x86_64_v4+avx512bf16+amx_tile+amx_bf16", *_AVX512[1:]),
    },
    "aarch64": {"neon": ("-mcpu=generic",)},
}
"""What Clang is told of the processor, by architecture and instruction set."""

TARGETS = {
    "linux-x86_64": ("x86_64-linux-gnu.2.17", "x86_64", "so"),
    "linux-aarch64": ("aarch64-linux-gnu.2.17", "aarch64", "so"),
    "macosx-arm64": ("aarch64-macos.12.0", "aarch64", "dylib"),
}
"""The platforms: Clang's name, the architecture and how a library's name ends. On others the package has no kernels."""

# Without trapping math, loops with a choice get vectors. No path of the machine that builds gets into the library.
FLAGS = ("-O3", "-std=c11", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared", "-s")


def get_target() -> str:
    """Name the platform that is built for: KERNELS_TARGET in the environment, or that of this machine."""
    if target := os.environ.get("KERNELS_TARGET"):
        if target not in TARGETS:
            raise RuntimeError(f"KERNELS_TARGET takes one of {', '.join(TARGETS)}, got: {target}")
        return target
    system = "macosx" if sys.platform == "darwin" else sys.platform
    return f"{system}-{platform.machine()}"


def get_library_names(target: str) -> dict[str, str]:
    """Name the file of each instruction set's library."""
    if target not in TARGETS:
        return {}
    _, architecture, ending = TARGETS[target]
    return {level: f"{level}.{ending}" for level in LEVELS[architecture]}


def compute_source_digest() -> str:
    """Compute the sha256 of all that decides what the kernels compute, on whatever platform."""
    recipe = json.dumps([version("ziglang"), FLAGS, LEVELS])
    files = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    return hashlib.sha256(b"\0".join([recipe.encode(), *files])).hexdigest()


def build_libraries(folder: Path, target: str) -> list[Path]:
    """Build the libraries of a platform into a folder, and write what they are; return the files.

    Raises:
        RuntimeError: the compiler refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries, paths = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for level, file_name in get_library_names(target).items():
            name, architecture, _ = TARGETS[target]
            made = Path(scratch) / file_name
            flags = [*FLAGS, *LEVELS[architecture][level]]
            flags += ["-install_name", f"@rpath/{file_name}"] if file_name.endswith(".dylib") else []
            command = [sys.executable, "-m", "ziglang", "cc", "-target", name, *flags, *SOURCES, "-o", str(made)]
            process = subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.PIPE, text=True)
            running.append((level, made, process))
        for level, made, process in running:
            _, errors = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"the kernels cannot be compiled for {level}: {errors}")
            content = made.read_bytes()
            libraries[level] = {"file": made.name, "sha256": hashlib.sha256(content).hexdigest()}
            paths.append(folder / made.name)
            paths[-1].write_bytes(content)
    facts = {"target": target, "digest": compute_source_digest(), "libraries": libraries}
    paths.append(folder / LIBRARIES)
    paths[-1].write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return paths
