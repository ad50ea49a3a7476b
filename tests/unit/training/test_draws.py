"""What operations draw is a function of seed, step and shard, whatever else draws at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from image_classifier.model.classifier import Classifier
from image_classifier.training.draws import Draws
from image_classifier.training.engine import build_engine
from image_classifier.training.threads import Threads
from tests.tiny import make_training

CPU = torch.device("cpu")
SETTINGS = make_training(
    model="some_package:build", device="cpu", engine="eager", precision="fp32", batch_size=32, shards=8
)


def draw(seed: int = 1, step: int = 2, number: int = 3) -> Tensor:
    with Draws(seed, step, number, CPU):
        return torch.cat([torch.rand(5), torch.nn.functional.dropout(torch.ones(50)), torch.randn(5)])


def test_numbers_depend_on_seed_step_and_shard_and_on_nothing_else() -> None:
    before = torch.random.get_rng_state()
    drawn = draw()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(7)
    assert torch.equal(draw(), drawn)
    assert not any(torch.equal(other, drawn) for other in (draw(seed=2), draw(step=3), draw(number=4)))
    assert not torch.equal(drawn[:5], drawn[-5:])  # it goes on, and does not begin again


class Dropping(nn.Module):
    """Drops features, and whole images as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3072, 10)
        self.norm = nn.BatchNorm1d(3072)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.dropout(self.norm(images.flatten(1)), 0.5, self.training)
        if self.training:
            features = features * torch.empty(len(images), 1).bernoulli_(0.7)
        logits: Tensor = self.head(features)
        return logits


def train(num_threads: int, engine: str = "eager", first_step: int = 1, batch_size: int = 32) -> list[Tensor]:
    """Take steps without an optimizer, and return the losses and gradients of the last two."""
    torch.manual_seed(0)
    classifier = Classifier(Dropping(), (0.5,) * 3, (0.25,) * 3).train()
    settings = replace(SETTINGS, engine=engine, batch_size=batch_size)  # type: ignore[arg-type]
    compute_gradients = build_engine(classifier, settings, Threads(num_threads))
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    results: list[Tensor] = []
    for step in range(first_step, 5):
        loss, _ = compute_gradients(images, torch.arange(batch_size) % 10, 32, step=step)
        results += [loss, *(each.grad.clone() for each in classifier.parameters() if each.grad is not None)]
    return results[-10:]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("batch_size", [32, 80])
def test_a_network_with_dropout_has_the_same_bits_with_any_number_of_threads_and_after_a_resume(
    batch_size: int,
) -> None:
    expected = train(1, batch_size=batch_size)
    assert not torch.equal(expected[0], expected[5])
    for others in (train(3, batch_size=batch_size), train(1, first_step=3, batch_size=batch_size)):
        assert_equal(others, expected)
    assert_equal(train(2, "compiled", batch_size=batch_size), expected)  # what cannot be repeated is torch's alone
