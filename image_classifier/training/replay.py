"""The operations of a step, written down once and then repeated without autograd.

With a few images a step, finding out what the backward pass has to do takes about as long as doing it. The operations
are the same, in the same order, and so are the bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

VARYING = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
"""Operations with these tags give something else each time, or decide what comes next."""

Replay = Callable[..., Sequence[Tensor | None]]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Writes down every operation that is computed while it is active.

    Args:
        inputs: what the repetitions will be called with; any other tensor that is met must come from an operation.

    Attributes:
        obstacle: why this cannot be repeated; empty if it can.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.obstacle = ""
        self._graph = Graph()
        self._nodes: dict[int, tuple[Node, Tensor]] = {}  # by id, which is the tensor's own as long as that is kept
        for number, tensor in enumerate(inputs):
            self._note(tensor, self._graph.placeholder(f"input_{number}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler to leave this class out, which takes a second

    def __torch_dispatch__(
        self, called: OpOverload, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        result = called(*arguments, **(options or {}))
        if VARYING.intersection(called.tags):
            self.obstacle = f"{called} is not the same each time"
        if called is torch.ops.aten.detach.default:  # the same tensor, to autograd another
            self._note(result, self._find(arguments[0]))
            return result
        node = self._graph.call_function(called, *map_aggregate((arguments, options or {}), self._find))
        if isinstance(result, Tensor):
            self._note(result, node)
        elif isinstance(result, (tuple, list)):
            for number, each in enumerate(result):
                if isinstance(each, Tensor):
                    self._note(each, self._graph.call_function(operator.getitem, (node, number)))
        return result

    def _note(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node, tensor

    def _find(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            self.obstacle = self.obstacle or "a tensor came from somewhere else"
            return None
        return self._nodes[id(value)][0]

    def build_replay(self, outputs: Sequence[Tensor | None]) -> Replay | None:
        """Build what repeats the operations on other inputs and gives these outputs; None if there is an obstacle."""
        self._graph.output(map_aggregate(tuple(outputs), self._find))
        if self.obstacle:
            return None
        self._graph.eliminate_dead_code()
        replay: Replay = GraphModule({}, self._graph).forward
        return replay
