"""Portable runs: the same bits on every processor, with any number of threads and processes, whatever is set."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from image_classifier.errors import SettingsError
from image_classifier.experiment import run
from image_classifier.kernels.builder import FOLDER as KERNELS
from image_classifier.kernels.builder import build_libraries, get_target
from image_classifier.kernels.library import read_header, split_name
from image_classifier.tracking.reading import compute_manifest_digest
from image_classifier.training import determinism
from image_classifier.training.portable_steps import is_exact
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.conftest import PROJECT, require_program, run_program
from tests.golden import CASES, RUNS, compute_digests, list_options, read_digests, write_dataset
from tests.kernel_calls import Recording, build_driver, record_steps, repeat_calls
from tests.tiny import make_settings, write_tiny_dataset

GOLDEN: dict[str, dict[str, str]] = json.loads(RUNS.read_text())
LEVELS = determinism.list_portable_kernels()
VARIABLES: dict[str, dict[str, str]] = {
    "ATen without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN of long ago": {"ONEDNN_MAX_CPU_ISA": "SSE41", "DNNL_DEFAULT_FPMATH_MODE": "BF16"},
    "MKL by its numbers": {"MKL_CBWR": "SSE4_2", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "teams of OpenMP": {"OMP_NUM_THREADS": "3", "OMP_DYNAMIC": "TRUE", "OMP_THREAD_LIMIT": "1"},
    "MKL with threads of its own": {"MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"},
    "a C library without FMA": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"},
    "NumPy without vectors": {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"},
    "denormals and allocation": {"MALLOC_ARENA_MAX": "1", "MALLOC_PERTURB_": "165", "LANG": "tr_TR.UTF-8"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_every_network_and_recipe_has_the_golden_bits(
    case: str, level: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(determinism.FORCE_KERNELS, level)
    num_threads = 1 + (list(CASES).index(case) + LEVELS.index(level)) % 4
    assert compute_digests(case, dataset, tmp_path, num_threads) == GOLDEN[case]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_any_number_of_threads_gives_the_golden_bits(num_threads: int, dataset: Path, tmp_path: Path) -> None:
    assert compute_digests("fast", dataset, tmp_path, num_threads) == GOLDEN["fast"]


def train(case: str, dataset: Path, folder: Path, *launcher: str, **variables: str) -> dict[str, str]:
    """Train a case by the command line, and read what it gives."""
    places = ["--experiments_folder", str(folder), "--experiment_name", "e", "--run_name", "r"]
    places += ["--dataset_folder", str(dataset)]
    command = [sys.executable, *launcher, "-m", "image_classifier.main", *places, *list_options(case)]
    settings = [f"{name}={value}" for name, value in variables.items()]
    run_program("env", *settings, *command, cwd=PROJECT)
    return read_digests(folder / "e" / "r")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_number_of_processes_gives_the_golden_bits(num_ranks: int, dataset: Path, tmp_path: Path) -> None:
    launcher = "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)
    level = LEVELS[num_ranks % len(LEVELS)]
    case = "fast" if num_ranks % 2 else "best"
    assert train(case, dataset, tmp_path, *launcher, **{determinism.FORCE_KERNELS: level}) == GOLDEN[case]


@pytest.mark.parametrize("variables", VARIABLES)
def test_no_variable_changes_a_bit(variables: str, dataset: Path, tmp_path: Path) -> None:
    case = "small" if len(variables) % 2 else "notebook"
    assert train(case, dataset, tmp_path, **VARIABLES[variables]) == GOLDEN[case]


class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Lets torch compute nothing that could come out in several ways, but for what only reads results."""

    def __torch_dispatch__(self, called: Any, types: object, arguments: Any = (), options: Any = None) -> Any:
        # The weights that torch draws are drawn anew by ourselves.
        has_no_part = called.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "uniform_")
        if not (has_no_part or called.namespace == "profiler" or is_exact(called, arguments, options or {})):
            raise AssertionError(f"torch computed {called}")
        return called(*arguments, **(options or {}))


@pytest.mark.parametrize("case", CASES)
def test_torch_computes_nothing_of_a_portable_run(case: str, dataset: Path, tmp_path: Path) -> None:
    with Refuse():  # type: ignore[no-untyped-call]  # likewise
        assert compute_digests(case, dataset, tmp_path, num_threads=1) == GOLDEN[case]


def test_torch_computes_a_native_run(dataset: Path, tmp_path: Path) -> None:
    refuse = Refuse()  # type: ignore[no-untyped-call]  # likewise
    with refuse, pytest.raises(AssertionError, match="torch computed aten"):
        run(make_settings(tmp_path, dataset, engine="compiled"))


def test_a_portable_run_is_verified_on_other_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_tiny_dataset(tmp_path / "data")
    result = run(make_settings(tmp_path / "experiments", dataset, instruction_set="portable", num_epochs=1))
    for level in LEVELS:
        monkeypatch.setenv(determinism.FORCE_KERNELS, level)
        assert verify(VerificationSettings(run_folder=result.folder)).verdict is Verdict.IDENTICAL
    record = json.loads((result.folder / "run.json").read_text())
    assert record["machine"]["class"].keys() == {"instruction_set", "kernels"}


def test_other_libraries_do_not_keep_a_portable_run_from_being_verified(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "data")
    result = run(make_settings(tmp_path / "experiments", dataset, instruction_set="portable", num_epochs=1))
    path = result.folder / "run.json"
    record = json.loads(path.read_text())
    record["environment"] = {**record["environment"], "python": "3.99", "digest": "0" * 64}
    change_file(result.folder, "run.json", json.dumps(record).encode())
    found = verify(VerificationSettings(run_folder=result.folder))
    assert found.verdict is Verdict.IDENTICAL
    assert any("different environment: python was 3.99" in reason for reason in found.reasons)


def change_file(folder: Path, name: str, content: bytes) -> None:
    """Change a file of a finished run, and the manifest with it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["digest"] = compute_manifest_digest(manifest)
    (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "bf16"], "--instruction_set portable computes in single precision"),
        (["--engine", "eager"], "--instruction_set portable computes in single precision"),
        (["--device", "cuda"], "--instruction_set portable computes in single precision"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: list[str], message: str, dataset: Path, tmp_path: Path) -> None:
    places = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", "r"]
    places += ["--dataset_folder", str(dataset)]
    command = [sys.executable, "-m", "image_classifier.main", *places, "--instruction_set", "portable", *options]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: {message}") and answer.stderr.count("\n") == 1
    assert not (tmp_path / "e").exists()


def test_a_processor_without_the_instructions_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "read_processor", lambda: {"flags": "sse2 avx"})
    monkeypatch.setattr(determinism, "is_arm", lambda: False)
    with pytest.raises(SettingsError, match="portable: this processor has neither AVX2 with FMA nor"):
        compute_digests("notebook", dataset, tmp_path)
    assert not (tmp_path / "golden").exists()


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_steps()


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "neon"])
def test_each_library_gives_the_bytes_of_the_others(level: str, recording: Recording, tmp_path: Path) -> None:
    program = build_driver(tmp_path, get_target())
    assert repeat_calls(recording, [str(program)], KERNELS / f"{level}.so") == []


def test_the_kernels_of_aarch64_give_the_same_bytes(recording: Recording, tmp_path: Path) -> None:
    emulator = require_program("qemu-aarch64-static")
    build_libraries(tmp_path, "linux-aarch64")
    program = build_driver(tmp_path, "linux-aarch64")
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", str(program)]
    assert repeat_calls(recording, command, tmp_path / "neon.so") == []


def test_each_kernel_for_floats_is_among_those_that_are_compared(recording: Recording) -> None:
    compared = {split_name(name)[0] for name in recording.names}
    # Whole numbers, and what is for bf16 alone.
    assert set(read_header()[1]) - compared == {"amx_filter_gradient"}
