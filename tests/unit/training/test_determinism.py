"""Threads, instruction set and precision: resolved, capped for real, refused where they cannot hold."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from image_classifier.errors import SettingsError
from image_classifier.training import determinism
from image_classifier.training.determinism import (
    CAPS,
    cap_instruction_set,
    configure_torch,
    get_instruction_set,
    resolve_settings,
    restore_nearest_settings,
)
from tests.tiny import make_training

PROBE = """
from image_classifier.training.determinism import cap_instruction_set, get_instruction_set
cap_instruction_set("{cap}")
import torch
print(torch.backends.cpu.get_cpu_capability(), get_instruction_set())
"""


def probe(cap: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key not in CAPS["avx2"]}
    command = [sys.executable, "-c", PROBE.format(cap=cap)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_every_auto_is_resolved_to_what_is_there() -> None:
    resolved = resolve_settings(make_training())
    assert resolved.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolved.precision in ("fp32", "bf16")
    assert resolved.shards == 4
    assert resolve_settings(resolved) == resolved


def test_what_was_asked_for_is_not_resolved_away() -> None:
    asked = make_training(device="cpu", precision="fp32", engine="eager", shards=7)
    assert resolve_settings(asked) == asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for one is right")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="--device cuda: torch sees no GPU here"):
        resolve_settings(make_training(device="cuda"))


def test_a_cap_holds_in_a_new_process() -> None:
    assert probe("avx2") == ["AVX2", "avx2"]


def test_without_a_cap_the_processor_gives_what_it_has() -> None:
    assert probe("native")[1] == get_instruction_set()


def test_a_cap_comes_too_late_once_torch_is_imported() -> None:
    with pytest.raises(
        SettingsError, match="--instruction_set avx2 cannot be set once torch is imported.*ATEN_CPU_CAPABILITY=avx2"
    ):
        cap_instruction_set("avx2")
    cap_instruction_set("native")


def test_an_instruction_set_above_the_machines_is_refused() -> None:
    script = (
        "from image_classifier.training.determinism import *; from tests.tiny import make_training;"
        "cap_instruction_set('avx2'); import image_classifier.errors as e\n"
        "try: resolve_settings(make_training(instruction_set='avx512'))\n"
        "except e.SettingsError as error: print(error)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("--instruction_set avx512: this machine has avx2 only")


def test_a_cap_above_the_processor_does_not_count_as_its_instruction_set() -> None:
    script = (
        "import torch; torch.cpu.get_capabilities = lambda: {'avx2': True}\n"
        "from image_classifier.training.determinism import get_instruction_set; print(get_instruction_set())"
    )
    environment = os.environ | CAPS["avx512"]
    answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "avx2\n"


def test_a_record_is_restored_with_the_nearest_of_what_is_unknown_here() -> None:
    recorded = asdict(make_training(shards=3))
    assert restore_nearest_settings(recorded) == (make_training(shards=3), [])
    unknown = {"device": "mps", "precision": "fp16", "engine": "inductor", "instruction_set": "avx10"}
    settings, lacks = restore_nearest_settings(recorded | unknown)
    assert settings == make_training(shards=3, device="cpu", precision="fp32", engine="eager")
    assert {lack.setting: lack.asked for lack in lacks} == unknown
    assert lacks[0].describe_replacement() == "device cpu instead of mps: this version knows cpu, cuda"
    with pytest.raises(SettingsError, match="does not take: --model takes .*; use the version that it names"):
        restore_nearest_settings(recorded | {"model": "vgg"})


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [("avx2 fma", "avx2"), ("avx2 fma avx512f avx512dq avx512bw avx512vl", "avx512"), ("sse2", "native")],
)
def test_a_record_of_a_better_processor_is_restored_with_the_best_of_this_one(
    flags: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "read_processor", lambda: {"flags": flags})
    settings, (lack,) = restore_nearest_settings({"instruction_set": "avx512_bf16"})
    assert settings.instruction_set == lack.nearest == nearest


def test_torch_is_configured_as_the_settings_say() -> None:
    try:
        configure_torch()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_variables_of_libraries_change_nothing_and_are_named() -> None:
    environment = os.environ | {
        "DNNL_MAX_CPU_ISA": "SSE41",
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROBE.format(cap="avx2") + "import os; print(*sorted(os.environ))"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split()[:2] == ["AVX2", "avx2"]
    assert {"DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"}.isdisjoint(answer.stdout.split())
    assert "MKL_NUM_THREADS" in answer.stdout.split() and "MKL_NUM_THREADS" not in answer.stderr
    for name in ("DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"):
        assert f"{name} was removed from the environment: it changes results but is not recorded" in answer.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2"), ("NPY_DISABLE_CPU_FEATURES", "AVX2")]
)
def test_a_variable_that_was_read_when_the_process_started_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name} changes results but is not recorded; unset it"):
        cap_instruction_set("native")
    monkeypatch.setenv("DNNL_CPU_ISA_HINTS", "PREFER_YMM")
    monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match="once torch is imported; .* or set DNNL_CPU_ISA_HINTS= before"):
        cap_instruction_set("native")
