"""Random numbers of operations such as dropout, as functions of seed, step and shard.

Torch draws them from one generator for all threads, so that they would depend on which thread comes first.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from image_classifier.randomness import DRAWS, draw_bits
from image_classifier.training.steps import DispatchMode

OF_THE_OPTIMIZER = 2**20
"""Stands in the place of a shard's number, of which there are at most 1,024."""

_LOCK = threading.Lock()


class Draws(DispatchMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """While it is active, lets the operations of its thread that draw numbers draw those of one step and shard.

    Args:
        device: of what is drawn.
    """

    def __init__(self, seed: int, step: int, number: int, device: torch.device) -> None:
        super().__init__()
        bits = int(draw_bits(seed, step, DRAWS, np.array([number]))[0])
        self._state = torch.Generator(device).manual_seed(bits >> 1).get_state()
        is_cuda = device.type == "cuda"
        self._generator = torch.cuda.default_generators[device.index or 0] if is_cuda else torch.default_generator

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in called.tags:
            return called(*arguments, **(options or {}))
        with _LOCK:
            before = self._generator.get_state()
            self._generator.set_state(self._state)
            try:
                return called(*arguments, **(options or {}))
            finally:
                self._state = self._generator.get_state()
                self._generator.set_state(before)
