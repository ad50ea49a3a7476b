"""The suite for optimizers: a good one passes, and each bad one fails with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from image_classifier.settings import TrainingSettings
from image_classifier.testing.optimizers import check_optimizer


class Forgetful(torch.optim.SGD):
    """Has a momentum that its state does not have."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.velocities: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                velocity = 0.9 * self.velocities.get(number, torch.zeros_like(parameter)) + parameter.grad
                self.velocities[number] = velocity
                parameter.sub_(velocity, alpha=group["lr"])


class Stubborn(torch.optim.SGD):
    """Takes no notice of the schedule."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.1
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Adds noise from torch's generator, which is that of the step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad += 0.1 * torch.randn_like(parameter)
        return super().step(closure)


class Lazy(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


class Holding(torch.optim.SGD):
    """Has something in its state that no checkpoint takes."""

    def step(self, closure: Any = None) -> Any:
        self.state["settings"] = TrainingSettings  # type: ignore[index]  # which is what is tried
        return super().step(closure)


NUM_BUILT = [0]


def build_others(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    NUM_BUILT[0] += 1
    return torch.optim.SGD(parameters, lr=0.1 * NUM_BUILT[0])


Build = Callable[[list[nn.Parameter], TrainingSettings], Any]
BAD: dict[str, tuple[Build, str]] = {
    "forgetful": (lambda p, s: Forgetful(p, lr=0.1), "after a checkpoint: its state_dict.. lacks something"),
    "stubborn": (lambda p, s: Stubborn(p, lr=0.1), "changes weights at a learning rate of 0"),
    "lazy": (lambda p, s: Lazy(p, lr=0.1), "changes no weights"),
    "others": (build_others, "gives other weights each time"),
    "with a closure": (lambda p, s: torch.optim.LBFGS(p), "fails in a step: TypeError: .*closure"),
    "some parameters": (lambda p, s: torch.optim.SGD(p[1:], lr=0.1), "must optimize exactly the 4 parameters"),
    "no optimizer": (lambda p, s: p, "returns list; it must return a torch.optim.Optimizer"),
    "cannot be built": (lambda p, s: torch.optim.SGD(p, lr=-1.0), "cannot be built: ValueError: Invalid learning rate"),
    "holding": (
        lambda p, s: Holding(p, lr=0.1),
        "values in its state_dict.. that checkpoints cannot store: .*TrainingSettings",
    ),
}


def test_good_optimizers_pass() -> None:
    check_optimizer(lambda parameters, settings: torch.optim.AdamW(parameters, lr=settings.learning_rate))
    check_optimizer(lambda parameters, settings: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5))
    check_optimizer(lambda parameters, settings: Noisy(parameters, lr=0.1))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_optimizer_fails_with_its_reason(name: str) -> None:
    build, reason = BAD[name]
    with pytest.raises(AssertionError, match=f"--optimizer optimizer:build .*{reason}"):
        check_optimizer(build)
