"""A run with our own kernels, proved as every run is."""

from __future__ import annotations

from pathlib import Path

import torch

from image_classifier.experiment import run
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.run import read_record
from image_classifier.verification import Verdict, VerificationSettings, verify
from tests.conftest import require_program
from tests.tiny import make_settings, write_tiny_dataset


def test_a_compiled_run_is_identical_when_trained_again(tmp_path: Path) -> None:
    require_program("gcc")
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
