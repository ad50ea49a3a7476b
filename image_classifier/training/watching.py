"""Observes all intermediate results of a step, for `bisect`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from image_classifier.training.shards import Shard
from image_classifier.training.steps import DispatchMode

Phase = Literal["state before", "batch", "forward", "backward", "gradient", "update"]

RATE = "learning rate"
"""The layer that the learning rate of a step stands under."""


@dataclass(frozen=True)
class Result:
    """One result of a step.

    Attributes:
        phase: of the step.
        layer: the module that computed it, or whose gradient it is; the tensor's name where nothing computed it.
        operator: of ATen, or in words.
        shard: of the batch; None for what is computed for all of it.
    """

    phase: Phase
    layer: str
    operator: str
    shard: int | None = None


Note = Callable[[Result, Tensor], None]


class Watch:
    """Shown what each step computes, in its order; this one looks at nothing, and none decides anything."""

    def begin(
        self, number: int, learning_rate: float, classifier: nn.Module, batch: Mapping[str, Tensor | None]
    ) -> None:
        """A step, counted from 1, is about to be taken on a batch: images, labels, targets."""

    def shard(self, shard: Shard, classifier: nn.Module) -> AbstractContextManager[None]:
        """Make what a shard is computed in, by operations of torch; kernels that repeat them are not seen."""
        return nullcontext()

    def gradients(self, classifier: nn.Module, num_shards: int) -> None:
        """The gradients are in the parameters, added up over the shards of a whole batch."""


class StepWatch(Watch):
    """Notes each result of every step.

    Args:
        note: what to do with a result and its tensor, which is to be read before this returns; several threads call it,
            one at a time.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._lock = threading.Lock()

    def begin(
        self, number: int, learning_rate: float, classifier: nn.Module, batch: Mapping[str, Tensor | None]
    ) -> None:
        what = "the weights that training starts from" if number == 1 else "the state that the step starts from"
        for name, tensor in classifier.state_dict().items():
            self._note(Result("state before", name, what), tensor)
        for name, values in batch.items():
            if values is not None:
                self._note(Result("batch", name, "the loader"), values)
        rate = torch.tensor(learning_rate, dtype=torch.float64)
        self._note(Result("batch", RATE, "the schedule"), rate)

    @contextmanager
    def shard(self, shard: Shard, classifier: nn.Module) -> Iterator[None]:
        # Reading a tensor is no part of the step and must not be recorded with it: in another thread no mode sees it.
        with ThreadPoolExecutor(1, thread_name_prefix="watch") as reader:
            watch = _ShardWatch(shard.number, lambda *each: reader.submit(self._note_in_turn, *each).result())
            with watch.follow(classifier), watch:
                yield

    def _note_in_turn(self, result: Result, tensor: Tensor) -> None:
        with self._lock:
            self._note(result, tensor)

    def gradients(self, classifier: nn.Module, num_shards: int) -> None:
        what = f"the sum over {num_shards} shards" if num_shards > 1 else "the gradient of the batch"
        # The order of the backward pass: the last layer's come first.
        for name, parameter in reversed(list(classifier.named_parameters())):
            if parameter.grad is not None:
                self._note(Result("gradient", name, what), parameter.grad)


class _ShardWatch(DispatchMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """Notes the result of each operation of ATen, with the layer that it is of."""

    def __init__(self, number: int, note: Note) -> None:
        super().__init__()
        self._number = number
        self._note = note
        self._layers = ["the loss"]  # which is of no module
        self._phase: Phase = "forward"
        self._followed: dict[Node, None] = {}  # kept, as a node is the same object only as long as somebody has it

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = called(*arguments, **(options or {}))
        several = result if isinstance(result, (tuple, list)) else [result]
        what = Result(self._phase, self._layers[-1], str(called), self._number)
        for tensor in several:
            if isinstance(tensor, Tensor):
                self._note(what, tensor)
        return result

    @contextmanager
    def follow(self, classifier: nn.Module) -> Iterator[None]:
        """Follow which layer is computing: forward by its hooks, backward by those of the nodes that it made."""
        handles = []
        for name, module in classifier.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name or "the classifier")))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, arguments: object) -> None:
        self._layers.append(name)

    def _leave(self, module: nn.Module, arguments: object, output: object) -> None:
        name = self._layers.pop()
        if isinstance(output, Tensor):
            self._follow_nodes(name, output)

    def _follow_nodes(self, layer: str, output: Tensor) -> None:
        pending = [output.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in self._followed:
                self._followed[node] = None
                node.register_prehook(partial(self._go_back, layer))
                pending += [following for following, _ in node.next_functions]

    def _go_back(self, layer: str, gradients: object) -> None:
        self._phase, self._layers = "backward", [layer]
