"""The training loop: learns, yields what it did, and leaves the global generator alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.model.airbench import Airbench
from image_classifier.model.catalog import build_classifier
from image_classifier.model.classifier import Classifier
from image_classifier.training.loop import train
from image_classifier.training.optimizer import build_optimizer
from tests.tiny import make_training

SETTINGS = make_training(
    model="resnet",
    optimizer="sgd",
    image_sizes=(32,),
    device="cpu",
    precision="fp32",
    schedule="constant",
    warmup_fraction=0.0,
    learning_rate=0.05,
    label_smoothing=0.0,
    weight_decay=0.0,
)


@dataclass(frozen=True)
class Pair:
    images: Tensor
    labels: Tensor
    targets: Tensor | None = None


class Linear(Classifier):
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.Linear(3 * 32 * 32, 10)
        super().__init__(nn.Sequential(nn.Flatten(), layer), (0.0,) * 3, (1.0,) * 3)
        self.layer = layer


def make_batches(count: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [Pair(images, torch.arange(20) % 10)] * count


def test_the_loop_learns_what_it_is_shown() -> None:
    model = Linear()
    steps = list(train(model, make_batches(60), build_optimizer(model, SETTINGS), SETTINGS, num_steps=60))
    assert float(steps[-1].loss) < 0.5 * float(steps[0].loss)
    assert int(steps[-1].num_correct) == 20


def test_a_step_says_what_was_done() -> None:
    model = Linear()
    settings = replace(SETTINGS, schedule="triangular", warmup_fraction=0.25, label_smoothing=0.1)
    batch = make_batches(1)[0]
    expected = F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).item()
    expected_correct = int((model(batch.images).argmax(1) == batch.labels).sum())
    optimizer = build_optimizer(model, settings)
    (step,) = train(model, [batch], optimizer, settings, num_steps=40, first_step=9)
    assert (step.number, step.num_images, int(step.num_correct)) == (10, 20, expected_correct)
    assert float(step.loss) == pytest.approx(expected)
    assert step.learning_rate == pytest.approx(0.05 * 10 / 11)
    assert step.seconds > 0


def test_the_loop_stops_between_steps_and_can_go_on() -> None:
    whole, parts = Linear(), Linear()
    for _ in train(whole, make_batches(6), build_optimizer(whole, SETTINGS), SETTINGS, num_steps=6):
        pass
    optimizer = build_optimizer(parts, SETTINGS)
    first = train(parts, make_batches(6), optimizer, SETTINGS, num_steps=6)
    for step in first:
        if step.number == 2:
            break
    for _ in train(parts, make_batches(4), optimizer, SETTINGS, num_steps=6, first_step=2):
        pass
    assert torch.equal(whole.layer.weight, parts.layer.weight)


def test_each_image_size_has_an_equal_part_of_the_steps() -> None:
    sizes: list[int | None] = []

    class Sized(Linear):
        def forward(self, images: Tensor, image_size: int | None = None) -> Tensor:
            sizes.append(image_size)
            return super().forward(images)

    settings = replace(SETTINGS, image_sizes=(16, 20, 32))
    for first_step, count in ((0, 7), (4, 3)):
        model = Sized()
        list(
            train(
                model,
                make_batches(count),
                build_optimizer(model, settings),
                settings,
                num_steps=7,
                first_step=first_step,
            )
        )
    assert sizes == [16, 16, 16, 20, 20, 32, 32] + [20, 32, 32]


@pytest.mark.parametrize("batch_size", [20, 100])  # steps that are written down and repeated, and others
def test_the_bias_of_whitened_patches_learns_in_the_first_three_eighths(batch_size: int) -> None:
    settings = replace(
        SETTINGS, model="airbench_small", optimizer="muon", engine="eager", batch_size=batch_size, image_sizes=(16,)
    )
    model = build_classifier("airbench_small", 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0)
    assert isinstance(model.network, Airbench) and model.network.whiten.bias is not None
    bias, others = model.network.whiten.bias, model.network.head.weight
    changed = []
    before = bias.detach().clone(), others.detach().clone()
    for _ in train(model, make_batches(8), build_optimizer(model, settings), settings, num_steps=8):
        now = bias.detach().clone(), others.detach().clone()
        changed.append([not torch.equal(one, other) for one, other in zip(before, now, strict=True)])
        before = now
    assert changed == [[True, True]] * 3 + [[False, True]] * 5


def test_nothing_is_drawn_from_the_global_generator() -> None:
    model = Linear()
    before = torch.random.get_rng_state()
    list(train(model, make_batches(3), build_optimizer(model, SETTINGS), SETTINGS, num_steps=3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_bf16_computes_close_to_fp32_and_keeps_fp32_weights() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = Linear()
        settings = replace(SETTINGS, precision=precision)
        steps = list(train(model, make_batches(5), build_optimizer(model, settings), settings, num_steps=5))
        losses[precision] = float(steps[-1].loss)
        assert model.layer.weight.dtype == torch.float32
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
