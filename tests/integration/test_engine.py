"""A run with our own kernels, proved as every run is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from image_classifier.experiment import run
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.reading import read_manifest, read_record
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.conftest import PROJECT, run_program
from tests.tiny import make_settings, write_tiny_dataset


def test_a_compiled_run_is_identical_when_trained_again(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "data")
    settings = make_settings(tmp_path / "experiments", dataset, engine="compiled", batch_size=16, num_epochs=1)
    result = run(settings)  # 200 images: the last batch is of 8
    assert read_record(result.folder)["settings"]["engine"] == "compiled"
    assert verify(VerificationSettings(run_folder=result.folder)).verdict is Verdict.IDENTICAL
    eager = run(make_settings(tmp_path / "experiments", dataset, "eager", batch_size=16, num_epochs=1, engine="eager"))
    untrained = run(make_settings(tmp_path / "experiments", dataset, "untrained", num_epochs=0))
    compiled, same, other = (
        load_model(folder / "model.pth").classifier.state_dict()["network.fc3.weight"]
        for folder in (result.folder, eager.folder, untrained.folder)
    )
    assert torch.allclose(compiled, same, rtol=0, atol=1e-6)
    assert not torch.allclose(compiled, other, rtol=0, atol=1e-4)


VARIABLES: dict[str, dict[str, str]] = {
    "none": {},
    "old names of oneDNN": {"DNNL_MAX_CPU_ISA": "SSE41", "DNNL_DEFAULT_FPMATH_MODE": "BF16"},
    "teams of OpenMP": {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "TRUE", "OMP_NUM_THREADS": "7"},
    "a compiler that does as it likes": {"CC": "false", "CFLAGS": "-Ofast"},
}


def test_no_variable_of_a_library_changes_a_bit_or_stops_a_run(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "data")
    options = "--recipe small --num_epochs 1 --batch_size 100 --shards 4 --num_threads 2 --precision fp32".split()
    cache = tmp_path / "cache"
    digests = {}
    for number, (case, variables) in enumerate(VARIABLES.items()):
        places = ["--experiments_folder", str(tmp_path), "--experiment_name", "e", "--run_name", f"r{number}"]
        command = [sys.executable, "-m", "image_classifier.main", *places, "--dataset_folder", str(dataset), *options]
        setting = ["env", *(f"{name}={value}" for name, value in variables.items())]
        run_program(*setting, *command, cwd=PROJECT, IMAGE_CLASSIFIER_CACHE=str(cache))
        digests[case] = read_manifest(tmp_path / "e" / f"r{number}")["weights_digest"]
    assert len(set(digests.values())) == 1, digests
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".dylib")], "native code in a cache"
