"""Optional methods of a network, found by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@runtime_checkable
class ArrangesWeights(Protocol):
    """A network whose convolutions and linear layers are drawn from the seed by `draw_weights`, as the package's own
    are, to the same bits on every processor."""

    def arrange_weights(self) -> None:
        """Make of weights that were drawn those that training begins with."""


@runtime_checkable
class InitializesFromImages(Protocol):
    """A network that has weights to compute from images."""

    def initialize_from(self, images: NDArray[np.uint8], mean: Tensor, std: Tensor) -> None:
        """Compute weights from the first training images [N, 3, H, W], which are scaled with these [3] in units of a
        pixel's 0 to 255; called once, before training from nothing."""


@runtime_checkable
class FollowsProgress(Protocol):
    """A network that trains parts of it for a part of the run only."""

    def begin_step(self, progress: float) -> None:
        """Set which parameters are trained (`requires_grad`), and nothing else, by what of the run is over, 0 to 1."""
