"""The engine: refused without kernels, and the same loss from both."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from image_classifier.choices import Precision
from image_classifier.data.mixing import build_targets
from image_classifier.errors import SettingsError
from image_classifier.kernels.library import Arguments, Kernels, get_kernels_digest
from image_classifier.model.catalog import build_classifier
from image_classifier.recipe import RECIPES
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.identity import describe_machine
from image_classifier.training.determinism import get_instruction_set, resolve_settings
from image_classifier.training.engine import build_engine
from image_classifier.training.large_steps import _TILED
from image_classifier.training.portable_steps import choose_arithmetic
from image_classifier.training.threads import Threads
from tests.tiny import make_training

SMALL = make_training(device="cpu", precision="fp32", batch_size=4)


def test_auto_is_compiled() -> None:
    assert resolve_settings(SMALL).engine == "compiled"


def test_without_kernels_auto_is_eager_and_says_so(without_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_settings(SMALL).engine == "eager"
    (message,) = caplog.messages
    assert message.startswith("steps are computed eagerly, which is slower: the package was installed without its ")


def test_a_compiled_run_without_kernels_is_refused(without_kernels: None) -> None:
    with pytest.raises(SettingsError, match="--engine compiled: .*install it again, or choose --engine eager"):
        resolve_settings(replace(SMALL, engine="compiled"))


def test_the_kernels_belong_to_the_machine_of_a_compiled_run_alone() -> None:
    eager, compiled = (
        describe_machine(resolve_settings(replace(SMALL, engine=engine)))["class"] for engine in ("eager", "compiled")
    )
    assert compiled == {**eager, "kernels": get_kernels_digest(get_instruction_set())}


@pytest.mark.parametrize(
    "settings", [SMALL, replace(SMALL, batch_size=100, precision="bf16"), replace(SMALL, instruction_set="portable")]
)
def test_targets_that_say_what_labels_do_give_the_same_loss(settings: TrainingSettings) -> None:
    settings = replace(resolve_settings(settings), engine="compiled", label_smoothing=0.2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (settings.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % 10
    targets = torch.from_numpy(build_targets(10, 0.2, np.ones(10)))[labels]
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for has_targets, values in found.items():
        classifier = build_classifier("resnet", 10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
        compute_gradients = build_engine(classifier, settings, Threads(1, choose_arithmetic(settings.instruction_set)))
        for _ in range(3):  # the operations are written down, compared with autograd, and repeated
            values += compute_gradients(images, labels, 32, targets if has_targets else None)
        values += [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.allclose(one, other, rtol=1e-2 if settings.precision == "bf16" else 1e-4, atol=1e-5)


def test_a_repeated_step_takes_the_targets_of_its_own_batch() -> None:
    settings = replace(resolve_settings(SMALL), engine="compiled", mixup=1.0)
    classifier = build_classifier("lenet", 10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    compute_gradients = build_engine(classifier, settings, Threads(1))
    logits = classifier(images)
    for number in range(4):
        targets = torch.rand(4, 10, generator=torch.Generator().manual_seed(number))
        loss, _ = compute_gradients(images, labels, 32, targets)
        assert torch.allclose(loss, F.cross_entropy(logits, targets), rtol=1e-5)


def test_an_eager_engine_leaves_gradients_and_counts_hits() -> None:
    settings = make_training(device="cpu", precision="fp32", engine="eager", model="lenet", label_smoothing=0.0)
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


IN_TWO_STEPS = {
    **{"batch_norm": 12, "batch_norm_gradient": 12, "gelu": 14, "gelu_gradient": 14},
    **{"max_pool": 6, "max_pool_gradient": 6},
    **{"winograd_filters": 20, "winograd_convolve": 20, "winograd_filter_gradient": 10},
}
"""Calls of kernels when a step of an airbench network at 16 x 16 is written down and then repeated."""
NOTEBOOK = {
    **{"argmax": 1, "convert_bytes": 1, "convolve": 3, "convolve_filter_gradient": 2, "copy": 1, "count_true": 1},
    **{"equal": 1, "log_softmax": 1, "log_softmax_gradient": 1, "matmul": 6, "matmul_transposed": 3, "nll_loss": 1},
    **{"nll_loss_gradient": 1, "pool_planes": 2, "pool_planes_gradient": 2, "relu": 4, "relu_gradient": 4},
    **{"shift_channels": 2, "sum_rows": 3},
}
NOT_IN_BF16 = ("notebook", "bf16")  # small batches have kernels for single precision, which the recipe has


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [(name, precision) for name in RECIPES for precision in ("fp32", "bf16") if (name, precision) != NOT_IN_BF16],
)
def test_each_recipe_computes_with_the_kernels_that_were_made_for_it(
    recipe: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_small = recipe == "notebook"
    settings = TrainingSettings.from_recipe(recipe)
    settings = replace(settings, precision=precision, shards=1, device="cpu", engine="compiled")
    taken: Counter[str] = Counter()
    call = Kernels.call

    def count(kernels: Kernels, kernel: str, arguments: Arguments, *, is_brief: bool = False) -> None:
        taken[kernel] += 1
        call(kernels, kernel, arguments, is_brief=is_brief)

    monkeypatch.setattr(Kernels, "call", count)
    classifier = build_classifier(settings.model, 10, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    labels = torch.arange(settings.batch_size if is_small else 80) % 10
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    build_engine(classifier, settings, Threads(1))(images, labels, 32 if is_small else 16)
    if is_small:
        assert taken == NOTEBOOK
        return
    kind = "float" if precision == "fp32" else "bf16"
    level = get_instruction_set()
    is_tiled = (torch.float32 if precision == "fp32" else torch.bfloat16) in _TILED.get(level, ())
    expected = {f"{name}_{kind}": number for name, number in IN_TWO_STEPS.items()}
    if not is_tiled:
        expected = {name: number for name, number in expected.items() if not name.startswith("winograd")}
    by_amx = taken.pop("amx_filter_gradient_bf16", 0)
    assert taken == expected and bool(by_amx) == (level == "amx_bf16" and precision == "bf16")
