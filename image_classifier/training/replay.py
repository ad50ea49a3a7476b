"""Records the operations of a step once, and then replays them without autograd.

With a few images a step, finding out what the backward pass has to do is a good part of the time. What is computed is
the same, in the same order, and so are the bits; only copies and aliases that autograd makes for itself are left out.
With kernels, operations that these can take are computed by them, from the first time on, and those that follow each
other in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from image_classifier.kernels.library import Arguments, Kernels
from image_classifier.training.large_steps import LargeSteps
from image_classifier.training.portable_steps import PortableSteps
from image_classifier.training.small_steps import SmallSteps
from image_classifier.training.steps import DispatchMode, Steps, is_brief

VARYING = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operations with these tags give something else each time, or decide what comes next."""

Replay = Callable[..., Sequence[Tensor | None]]

Step = Callable[[list[Any]], None]
"""Repeats a part of a program on the values of its names: takes some and sets others."""


@dataclass(frozen=True)
class Program:
    """Operations that were written down.

    Attributes:
        replay: from the inputs, and then what was prepared of each parameter, to the outputs.
        prepare: from each parameter to what depends on it alone, so that it is computed once for all shards of a step;
            None where there is nothing.
    """

    replay: Replay
    prepare: list[Callable[[Tensor], list[Tensor]] | None]


@dataclass(frozen=True)
class _Name:
    """Stands for a tensor among an operation's arguments."""

    name: str


@dataclass(frozen=True)
class _KernelCall:
    """A call of a kernel.

    Attributes:
        names: of its tensors by the field of the arguments that has the address, what it writes to first.
        is_brief: whether it ends in a few microseconds.
    """

    kernel: str
    arguments: Arguments
    names: Mapping[str, str]
    is_brief: bool


@dataclass(frozen=True)
class _Line:
    """An operation of the program.

    Attributes:
        targets: names of what it gives.
        is_several: whether it gives a sequence.
        used: names of what it takes.
        is_mutating: whether it changes a tensor.
        function: what computes it, unless a kernel does; with `arguments` and `options`, in which names stand for
            tensors.
    """

    targets: tuple[str, ...]
    is_several: bool
    used: frozenset[str]
    is_mutating: bool
    function: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None
    call: _KernelCall | None = None

    @property
    def output(self) -> str | None:
        """What a kernel without a result of its own writes to first."""
        return next(iter(self.call.names.values())) if self.call and not self.targets else None


class Recorder(DispatchMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """Writes down every operation that is computed while it is active, as a line of a program.

    Args:
        inputs: what the repetitions will be called with; any other tensor that is met must come from an operation.
        state: those of them whose memory stays where it is.
        kernels: what computes operations in torch's place, if there are any.
        is_small: whether kernels write to memory of their own, which costs no time to get and is never let go of.
        is_portable: whether all is computed by kernels.

    Attributes:
        obstacle: why this cannot be repeated; empty if it can.
        steps: what finds kernels for operations, if there are any.
    """

    def __init__(
        self,
        inputs: Iterable[Tensor],
        state: Iterable[Tensor] = (),
        kernels: Kernels | None = None,
        *,
        is_small: bool = True,
        is_portable: bool = False,
    ) -> None:
        super().__init__()
        self.obstacle = ""
        self._kernels = kernels
        self._fixed: dict[str, Tensor] = {}  # whose memory every repetition finds at the same place
        self._roots: dict[str, str] = {}  # of which of these another one is a view
        self._lines: list[_Line] = []
        self._names: dict[int, str] = {}  # by id, which is a tensor's own as long as that is kept
        self._kept: list[Tensor] = []
        self._copies: dict[str, tuple[int, Tensor]] = {}  # by the copy's name: the line that fills it, and the original
        self._inputs = [self._name(tensor) for tensor in inputs]
        self._is_small = is_small
        self._is_making = False
        self._made: set[str] = set()
        self.steps: Steps | None = None
        if kernels is not None and is_portable:
            self.steps = PortableSteps(kernels, self._make, self._call_kernel, is_small=is_small)
        elif kernels is not None:
            self.steps = (SmallSteps if is_small else LargeSteps)(kernels, self._make, self._call_kernel)
        if kernels is not None and is_small:
            self._fixed |= {self._name(tensor): tensor for tensor in state}

    def __torch_dispatch__(
        self, called: Any, types: object, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if self._is_making:
            return called(*arguments, **options)
        if self.steps is not None:
            with self:  # so that what it calls of torch is written down, too
                computed = self.steps.compute(called, arguments, options)
            if computed is not None:
                return computed
        result = called(*arguments, **options)
        if VARYING.intersection(called.tags):
            self.obstacle = self.obstacle or f"{called} is not the same each time"
        if called is torch.ops.aten.detach.default:  # the same tensor, to autograd another
            self._kept.append(result)
            self._names[id(result)] = self._find_name(arguments[0])
            return result
        if (original := self._find_original(called, arguments, result)) is not None:
            name = self._name(result)
            self._fixed[name], self._roots[name] = result.detach(), self._find_root(original)
            return result
        used: set[str] = set()
        line_arguments = tuple(self._express(value, used) for value in arguments)
        line_options = {name: self._express(value, used) for name, value in options.items()}
        if called is torch.ops.aten.copy_.default and _has_same_layout(*arguments[:2]):
            self._copies[line_arguments[0].name] = len(self._lines), arguments[1]
        is_several = isinstance(result, (tuple, list))
        targets = tuple(self._name(each) for each in (result if is_several else [result]))
        is_mutating = called._schema.is_mutable
        self._lines.append(
            _Line(targets, is_several, frozenset(used), is_mutating, called, line_arguments, line_options)
        )
        return result

    def _make(self, function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """Make what kernels write to: for small steps memory that stays."""
        self._is_making = True
        tensor = function(*arguments, **options)
        self._is_making = False
        name = self._name(tensor)
        if self._is_small:
            self._fixed[name] = tensor.detach()  # without what autograd will hang on to it
            self._made.add(name)
        else:
            how = {"dtype": tensor.dtype}
            geometry = tuple(tensor.shape), tensor.stride()
            self._lines.append(_Line((name,), False, frozenset(), False, torch.empty_strided, geometry, how))
        return tensor

    def _call_kernel(
        self, kernel: str, arguments: Arguments, written: Mapping[str, Tensor], read: Mapping[str, Tensor]
    ) -> None:
        assert self._kernels is not None
        self._kernels.call(kernel, arguments)
        used: set[str] = set()
        outputs = self._name_all(written, used)
        is_made = self._is_small and self._made.issuperset(outputs.values())
        if is_made:
            used = set()
        names = {**outputs, **self._name_all(read, used)}
        call = _KernelCall(kernel, arguments, names, is_brief({**written, **read}))
        targets = tuple(outputs.values()) if is_made else ()
        self._lines.append(_Line(targets, False, frozenset(used), not is_made, call=call))

    def _name_all(self, tensors: Mapping[str, Tensor], used: set[str]) -> dict[str, str]:
        """Find the names of a kernel's tensors, by field, and add them to the used ones."""
        names = {field: self._find_name(tensor) for field, tensor in tensors.items()}
        used.update(map(self._find_root, names.values()))
        return names

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
            return "no tensor"
        self._kept.append(value)
        return self._names.setdefault(id(value), f"tensor_{len(self._names)}")

    def _find_name(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            self.obstacle = self.obstacle or "a tensor came from somewhere else"
        return self._names.get(id(tensor), "unknown")

    def _express(self, value: Any, used: set[str]) -> Any:
        """Put names in the place of tensors, and add them to the used ones."""
        if isinstance(value, Tensor):
            name = self._find_name(value)
            used.add(self._find_root(name))
            return _Name(name)
        if isinstance(value, (tuple, list)) and any(isinstance(each, Tensor) for each in value):
            return [self._express(each, used) for each in value]
        return value

    def build_replay(self, outputs: Sequence[Tensor | None]) -> Replay | None:
        """Build what repeats the operations on other inputs and gives these outputs; None if there is an obstacle."""
        program = self.build_program(outputs, [])
        return None if program is None else program.replay

    def build_program(self, outputs: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Program | None:
        """Build what repeats the operations, with what depends on one parameter alone apart; None as above.

        A line that nothing needs is left out, and a tensor is let go of after the last line that needs it.
        """
        names_of_parameters = [self._name(parameter) for parameter in parameters]
        names = ["" if output is None else self._find_name(output) for output in outputs]
        if self.obstacle:
            return None
        names = self._leave_out_copies(names)
        wanted = {*self._inputs, *map(self._find_root, names)}
        kept: list[tuple[_Line, list[str]]] = []
        for line in reversed(self._lines):
            if line.is_mutating or not wanted.isdisjoint(line.targets):
                kept.append((line, sorted(line.used - wanted - self._fixed.keys())))
                wanted |= line.used
        lines = list(reversed(kept))
        owners = self._find_owners([line for line, _ in lines], names_of_parameters)
        prepare: list[Callable[[Tensor], list[Tensor]] | None] = []
        prepared: list[str] = []
        for parameter in names_of_parameters:
            mine = [(line, list[str]()) for (line, _), owner in zip(lines, owners, strict=True) if owner == parameter]
            made = {name for line, _ in mine for name in (line.targets or [line.output])}
            rest = [line.used for (line, _), owner in zip(lines, owners, strict=True) if owner is None]
            needed = sorted(name for name in made & set().union(*rest, map(self._find_root, names)) if name)
            prepared += needed
            prepare.append(self._build(mine, [parameter], needed) if needed else None)  # type: ignore[arg-type]
        others = [each for each, owner in zip(lines, owners, strict=True) if owner is None]
        return Program(self._build(others, [*self._inputs, *prepared], names), prepare)

    def _build(
        self, lines: Sequence[tuple[_Line, Sequence[str]]], inputs: Sequence[str], outputs: Sequence[str]
    ) -> Replay:
        """Build a function that repeats lines; after each, it lets go of what stands beside it."""
        slots: dict[str, int] = {}

        def find(name: str) -> int:
            return slots.setdefault(name, len(slots))

        num_inputs = len([find(name) for name in inputs])
        needed = set(outputs).union(*(line.used for line, _ in lines))
        steps: list[Step] = []
        for has_kernels, group in groupby(lines, key=lambda each: each[0].call is not None):
            several = list(group)
            if has_kernels:
                steps.append(self._build_kernels([line.call for line, _ in several if line.call], find))
            for line, done in several:
                if not has_kernels:
                    targets = [find(name) if name in needed else None for name in line.targets]
                    steps.append(_build_operation(line, targets, find))
                if done:
                    steps.append(_build_release([find(name) for name in done]))
        results = [find(name) for name in outputs]
        start = [self._fixed.get(name) for name in slots][num_inputs:]

        def replay(*values: Tensor) -> list[Tensor | None]:
            held: list[Any] = [*values, *start]
            for step in steps:
                step(held)
            return [held[slot] for slot in results]

        return replay

    def _build_kernels(self, calls: Sequence[_KernelCall], find: Callable[[str], int]) -> Step:
        """Build a step of kernels, which are told where the tensors are that move."""
        assert self._kernels is not None
        kernels = self._kernels
        moving = [
            [(field, find(name)) for field, name in call.names.items() if name not in self._fixed] for call in calls
        ]
        if self._is_small:
            chain = kernels.chain([(call.kernel, call.arguments) for call in calls])
            places = [
                (call.arguments, field, slot)
                for call, fields in zip(calls, moving, strict=True)
                for field, slot in fields
            ]
            kept = self._fixed  # the memory that the arguments point to

            def run_chain(values: list[Any], kept: object = kept) -> None:
                for arguments, field, slot in places:
                    setattr(arguments, field, values[slot].data_ptr())
                chain()

            return run_chain

        def run_each(values: list[Any]) -> None:
            for call, fields in zip(calls, moving, strict=True):
                arguments = type(call.arguments).from_buffer_copy(call.arguments)  # several threads may be here
                for field, slot in fields:
                    setattr(arguments, field, values[slot].data_ptr())
                kernels.call(call.kernel, arguments, is_brief=call.is_brief)

        return run_each

    def _find_owners(self, lines: Sequence[_Line], parameters: Sequence[str]) -> list[str | None]:
        """Find of which lines the results depend on one parameter alone, and on which."""
        owners: dict[str, str] = {name: name for name in parameters}
        fresh: dict[str, int] = {}
        found: list[str | None] = [None] * len(lines)
        for index, line in enumerate(lines):
            output = line.output
            of_inputs = {owners.get(name) for name in line.used - {output}}
            owner = of_inputs.pop() if len(of_inputs) == 1 else None
            if not line.used:
                fresh |= {name: index for name in line.targets}
            elif owner is not None and output in fresh:  # a kernel writes to memory that is new
                found[index] = found[fresh.pop(output)] = owners[output] = owner
            elif owner is not None and not line.is_mutating:
                found[index] = owner
                owners |= {name: owner for name in line.targets}
            else:
                for name in line.used:
                    fresh.pop(name, None)
        return found

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


def _build_operation(line: _Line, targets: Sequence[int | None], find: Callable[[str], int]) -> Step:
    """Build a step of an operation of torch; what it gives goes to the targets, or nowhere."""
    function = line.function
    assert function is not None
    take_arguments = [_build_getter(value, find) for value in line.arguments]
    take_options = {name: _build_getter(value, find) for name, value in (line.options or {}).items()}

    def compute(values: list[Any]) -> None:
        options = {name: take(values) for name, take in take_options.items()}
        result = function(*[take(values) for take in take_arguments], **options)
        for slot, each in zip(targets, result if line.is_several else [result], strict=True):
            if slot is not None:
                values[slot] = each

    return compute


def _build_getter(value: Any, find: Callable[[str], int]) -> Callable[[list[Any]], Any]:
    """Build what finds an argument among the values of names."""
    if isinstance(value, _Name):
        return itemgetter(find(value.name))
    if isinstance(value, list) and any(isinstance(each, _Name) for each in value):
        getters = [_build_getter(each, find) for each in value]
        return lambda values: [get(values) for get in getters]
    return lambda values: value


def _build_release(slots: Sequence[int]) -> Step:
    def release(values: list[Any]) -> None:
        for slot in slots:
            values[slot] = None

    return release


def _get_memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and one.dtype == other.dtype and one.shape == other.shape
