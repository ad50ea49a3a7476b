"""The engine: refused without a compiler, and the same loss from both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from image_classifier.config import TrainingSettings
from image_classifier.errors import SettingsError
from image_classifier.model.catalog import build_classifier
from image_classifier.tracking.identity import describe_machine
from image_classifier.training.determinism import find_compiler, resolve_settings
from image_classifier.training.engine import build_engine
from tests.conftest import require_program

SMALL = TrainingSettings(device="cpu", precision="fp32", batch_size=4)


def test_auto_is_compiled() -> None:
    require_program("gcc")
    assert resolve_settings(SMALL).engine == "compiled"


def test_without_a_compiler_auto_is_eager_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert resolve_settings(SMALL).engine == "eager"
    (message,) = caplog.messages
    assert message.startswith("steps are computed eagerly, which is slower: there is no C compiler gcc: install gcc")


def test_a_compiled_run_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SettingsError, match="--engine compiled: .*install gcc.*or choose --engine eager"):
        resolve_settings(replace(SMALL, engine="compiled"))


def test_the_compiler_belongs_to_the_machine_of_a_compiled_run_alone() -> None:
    require_program("gcc")
    eager, compiled = (
        describe_machine(resolve_settings(replace(SMALL, engine=engine)))["class"] for engine in ("eager", "compiled")
    )
    assert compiled == {**eager, "compiler": find_compiler()}


def test_an_eager_engine_leaves_gradients_and_counts_hits() -> None:
    settings = TrainingSettings(device="cpu", precision="fp32", engine="eager", model="lenet", label_smoothing=0.0)
    classifier = build_classifier("lenet", 10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    predicted = classifier(images).argmax(dim=1)
    labels = torch.where(torch.arange(6) < 4, predicted, (predicted + 1) % 10)
    compute_gradients = build_engine(classifier, settings)
    loss, num_correct = compute_gradients(images, labels, 32)
    assert num_correct == 4
    assert loss == F.cross_entropy(classifier(images), labels)
    first = [parameter.grad for parameter in classifier.parameters()]
    compute_gradients(images, labels, 32)  # sets gradients anew, does not add to them
    for before, parameter in zip(first, classifier.parameters(), strict=True):
        assert before is not None and parameter.grad is not None and torch.equal(before, parameter.grad)
