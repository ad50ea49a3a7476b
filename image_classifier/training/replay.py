"""The operations of a step, written down once and then repeated without autograd.

With a few images a step, finding out what the backward pass has to do is a good part of the time. What is computed is
the same, in the same order, and so are the bits; only copies and aliases that autograd makes for itself are left out.
With kernels, operations that these can take are computed by them, from the first time on, and those that follow each
other in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from image_classifier.training.kernels import Run
from image_classifier.training.small_steps import Call, prepare_call

VARYING = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operations with these tags give something else each time, or decide what comes next."""

Replay = Callable[..., Sequence[Tensor | None]]


@dataclass(frozen=True)
class _Line:
    """A call of the program: what it sets, one value or several; the names in it; whether it changes a tensor.

    With kernels, `call` is empty, what it sets is in their result, and `operands` has where in their words the address
    of which name stands.
    """

    targets: tuple[str, ...]
    is_several: bool
    call: str
    used: frozenset[str]
    is_mutating: bool
    kernels: Call | None = None
    operands: tuple[tuple[int, str], ...] = ()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Writes down every operation that is computed while it is active, as a line of a program.

    Args:
        inputs: what the repetitions will be called with; any other tensor that is met must come from an operation.
        state: those of them whose memory stays where it is.
        run: what runs kernels, if there are any.

    Attributes:
        obstacle: why this cannot be repeated; empty if it can.
    """

    def __init__(self, inputs: Iterable[Tensor], state: Iterable[Tensor] = (), run: Run | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.obstacle = ""
        self._run = run
        self._fixed: dict[str, Tensor] = {}  # whose memory every repetition finds at the same place
        self._roots: dict[str, str] = {}  # of which of these another one is a view
        self._lines: list[_Line] = []
        self._constants: dict[str, Any] = {}
        self._names: dict[int, str] = {}  # by id, which is a tensor's own as long as that is kept
        self._kept: list[Tensor] = []
        self._copies: dict[str, tuple[int, Tensor]] = {}  # by the copy's name: the line that fills it, and the original
        self._inputs = [self._name(tensor) for tensor in inputs]
        if run is not None:
            self._fixed |= {self._name(tensor): tensor for tensor in state}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler to leave this class out, which takes a second

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if self._run is not None and (kernels := prepare_call(called, arguments, options)) is not None:
            return self._run_kernels(self._run, kernels)
        result = called(*arguments, **options)
        if VARYING.intersection(called.tags):
            self.obstacle = self.obstacle or f"{called} is not the same each time"
        if called is torch.ops.aten.detach.default:  # the same tensor, to autograd another
            self._kept.append(result)
            self._names[id(result)] = self._express(arguments[0], set())
            return result
        used: set[str] = set()
        if (original := self._find_original(called, arguments, result)) is not None:
            name = self._name(result)
            self._fixed[name], self._roots[name] = result.detach(), self._find_root(original)
            return result
        words = [self._express(value, used) for value in arguments]
        words += [f"{name}={self._express(value, used)}" for name, value in options.items()]
        function = self._keep(getattr(called, "_op", called))  # what the overload calls, without the call between
        if called is torch.ops.aten.copy_.default and _has_same_layout(*arguments[:2]):
            self._copies[words[0]] = len(self._lines), arguments[1]
        is_several = isinstance(result, (tuple, list))
        targets = tuple(self._name(each) for each in (result if is_several else [result]))
        call = f"{function}({', '.join(words)})"
        self._lines.append(_Line(targets, is_several, call, frozenset(used), called._schema.is_mutable))
        return result

    def _run_kernels(self, run: Run, kernels: Call) -> Any:
        run(_build_array(kernels.words), len(kernels.words))
        used: set[str] = set()
        operands = tuple((place, self._express(operand, used)) for place, operand in kernels.operands)
        is_several = isinstance(kernels.result, tuple)
        results = kernels.result if is_several else (kernels.result,)
        targets = tuple(self._name(each) for each in results)
        # Without what autograd will hang on to the result.
        self._fixed |= {name: each.detach() for name, each in zip(targets, results, strict=True) if each is not None}
        self._lines.append(_Line(targets, is_several, "", frozenset(used), False, kernels, operands))
        return kernels.result

    def _find_original(self, called: Any, arguments: tuple[Any, ...], result: Any) -> str | None:
        """Find which tensor whose memory stays where it is a result is only another view of."""
        if called._schema.is_mutable or not isinstance(result, Tensor):
            return None
        for each in arguments:
            name = self._names.get(id(each), "")
            if name in self._fixed and id(each) != id(result) and _get_memory(each) == _get_memory(result):
                return name
        return None

    def _find_root(self, name: str) -> str:
        return self._roots.get(name, name)

    def _name(self, value: Any) -> str:
        """Name what an operation has given; the name stays where it changed a tensor that has one."""
        if not isinstance(value, Tensor):
            return "_"
        self._kept.append(value)
        return self._names.setdefault(id(value), f"tensor_{len(self._names)}")

    def _express(self, value: Any, used: set[str]) -> str:
        """Express an argument as the program has it, and add the names of its tensors to the used ones."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self.obstacle = self.obstacle or "a tensor came from somewhere else"
            name = self._names.get(id(value), "_")
            used.add(self._find_root(name))
            return name
        if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
            return f"[{', '.join(self._express(each, used) for each in value)}]"
        return self._keep(value)

    def _keep(self, value: Any) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = value
        return name

    def build_replay(self, outputs: Sequence[Tensor | None]) -> Replay | None:
        """Build what repeats the operations on other inputs and gives these outputs; None if there is an obstacle.

        A line that nothing needs is left out, and a tensor is let go of after the last line that needs it.
        """
        names = [self._express(output, set()) for output in outputs]
        if self.obstacle:
            return None
        names = self._leave_out_copies(names)
        wanted = {*self._inputs, *map(self._find_root, names)}
        kept: list[tuple[_Line, list[str], list[str]]] = []
        for line in reversed(self._lines):
            if line.is_mutating or not wanted.isdisjoint(line.targets):
                done = sorted(line.used - wanted - self._fixed.keys())
                kept.append((line, [name if name in wanted else "_" for name in line.targets], done))
                wanted |= line.used
        program = [f"def replay({', '.join(self._inputs)}):"]
        for is_kernel, group in groupby(reversed(kept), key=lambda each: each[0].kernels is not None):
            lines = list(group)
            if is_kernel:
                program += self._build_kernel_lines([line for line, _, _ in lines])
            for line, names_of_results, done in lines:
                if not is_kernel:
                    targets = ", ".join(names_of_results)
                    program.append(f"    {f'[{targets}]' if line.is_several else targets} = {line.call}")
                program += [f"    del {', '.join(done)}"] if done else []
        program.append(f"    return [{', '.join(names)}]")
        namespace = {**self._constants, **self._fixed}
        exec("\n".join(program), namespace)  # of what is written above, as dataclasses do it
        replay: Replay = namespace["replay"]
        return replay

    def _build_kernel_lines(self, lines: Sequence[_Line]) -> list[str]:
        """Put the calls of several lines into one array, and tell it where the tensors are that move."""
        calls = [line.kernels for line in lines if line.kernels is not None]
        words = [word for call in calls for word in call.words]
        array = self._keep(_build_array(words))
        program, start = [], 0
        for line, call in zip(lines, calls, strict=True):
            moving = [(start + place, name) for place, name in line.operands if name not in self._fixed]
            program += [f"    {array}[{place}] = {name}.data_ptr()" for place, name in moving]
            start += len(call.words)
        self._keep([call.scratch for call in calls])  # as long as the program, whose words point to it
        return [*program, f"    {self._keep(self._run)}({array}, {len(words)})"]

    def _leave_out_copies(self, outputs: list[str]) -> list[str]:
        """Take originals for outputs that are copies: autograd copies a gradient that somebody else, as we, holds.

        Not where the original shares its memory with an input or another output, or is changed later.
        """
        tensors = {self._names[id(tensor)]: tensor for tensor in self._kept}
        taken = {_get_memory(tensors[name]) for name in self._inputs}
        results = []
        for output in outputs:
            if output in self._copies:
                index, original = self._copies[output]
                name = self._names[id(original)]
                is_changed = any(line.is_mutating and line.used & {output, name} for line in self._lines[index + 1 :])
                if not is_changed and _get_memory(original) not in taken:
                    self._lines[index] = replace(self._lines[index], is_mutating=False)  # so that nothing needs it
                    taken.add(_get_memory(original))
                    output = name
            results.append(output)
        return results


def _build_array(words: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(words))(*words)


def _get_memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and one.dtype == other.dtype and one.shape == other.shape
