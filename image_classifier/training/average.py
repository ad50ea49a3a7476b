"""An exponential moving average of a network's weights (Polyak, Juditsky: Acceleration of Stochastic Approximation)."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from image_classifier.settings import TrainingSettings
from image_classifier.training.threads import Arithmetic

Network = TypeVar("Network", bound=nn.Module)


class Average(Generic[Network]):
    """The average of the weights that a classifier had after each step, and of its batch norm's statistics.

    Attributes:
        classifier: a copy, with the averages in the place of weights and statistics.
    """

    def __init__(self, classifier: Network, decay: float, arithmetic: Arithmetic) -> None:
        self.classifier = copy.deepcopy(classifier)
        self._decay = decay
        self._arithmetic = arithmetic

    @torch.no_grad()
    def update(self, classifier: nn.Module, step: int) -> None:
        """Move the averages on to the present weights, after a step counted from 1.

        The decay grows with the steps up to what was asked for, so that the first weights are forgotten as soon as
        there are better ones (TensorFlow: ExponentialMovingAverage).
        """
        rate = 1 - min(self._decay, (1 + step) / (10 + step))
        present = classifier.state_dict()
        with self._arithmetic():
            for name, average in self.classifier.state_dict().items():
                if average.is_floating_point():
                    average.add_(present[name] - average, alpha=rate)
                else:  # how many batches were normalised
                    average.copy_(present[name])


def build_average(classifier: Network, settings: TrainingSettings, arithmetic: Arithmetic) -> Average[Network] | None:
    """Build the average of a classifier's weights if the settings ask for one.

    Args:
        arithmetic: entered around what is computed.
    """
    return Average(classifier, settings.ema_decay, arithmetic) if settings.ema_decay else None
