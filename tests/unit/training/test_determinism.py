"""Threads, instruction set and precision: resolved, capped for real, refused where they cannot hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from image_classifier.config import TrainingSettings
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
from tests.conftest import PROJECT

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
    resolved = resolve_settings(TrainingSettings())
    assert resolved.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolved.precision in ("fp32", "bf16")
    assert resolved.num_threads == len(os.sched_getaffinity(0))
    assert resolve_settings(resolved) == resolved


def test_what_was_asked_for_is_not_resolved_away() -> None:
    asked = TrainingSettings(device="cpu", precision="fp32", engine="eager", num_threads=7)
    assert resolve_settings(asked) == asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for one is right")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="--device cuda: torch sees no GPU here"):
        resolve_settings(TrainingSettings(device="cuda"))


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
        "from image_classifier.training.determinism import *; from image_classifier.config import *;"
        "cap_instruction_set('avx2'); import image_classifier.errors as e\n"
        "try: resolve_settings(TrainingSettings(instruction_set='avx512'))\n"
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


def test_more_threads_than_may_be_started_are_refused_with_the_number() -> None:
    script = (
        "import torch\n"
        "from image_classifier.training.determinism import *; from tests.confined import limit_memory\n"
        "limit_memory(2**28)\n"
        "settings, lacks = resolve_nearest_settings(TrainingSettings(num_threads=1000, engine='eager'))\n"
        "print(settings.num_threads <= len(os.sched_getaffinity(0)), *lacks)\n"
        "try: resolve_settings(TrainingSettings(num_threads=1000))\n"
        "except SettingsError as error: print(error)"
    )
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    reason = "this process may start [0-9]+ only"
    assert re.fullmatch(
        rf"True num_threads was 1000: {reason}\n--num_threads 1000: {reason}; choose fewer, or .*ulimit -u.*\n", answer
    ), answer


def test_a_record_is_restored_with_the_nearest_of_what_is_unknown_here() -> None:
    recorded = asdict(TrainingSettings(num_threads=3))
    assert restore_nearest_settings(recorded) == (TrainingSettings(num_threads=3), [])
    unknown = {"device": "mps", "precision": "fp16", "engine": "inductor", "instruction_set": "avx10"}
    settings, lacks = restore_nearest_settings(recorded | unknown)
    assert settings == TrainingSettings(num_threads=3, device="cpu", precision="fp32", engine="eager")
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
    settings = resolve_settings(TrainingSettings(num_threads=1))
    threads = torch.get_num_threads()
    try:
        configure_torch(settings)
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
        configure_torch(replace(settings, deterministic=False))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        configure_torch(replace(settings, num_threads=threads, deterministic=False))
