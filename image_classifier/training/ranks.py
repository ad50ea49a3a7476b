"""Distributes the shards of each step over processes on one or several machines, started by torchrun.

They exchange bytes, and each adds them in the same tree. A library's sum over processes (`all_reduce`) would add in an
order of its own.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # which torch documents

from image_classifier.errors import RankError
from image_classifier.text import one_line
from image_classifier.training.tree import Node

TIMEOUT_S = 60
"""Longest time that a rank waits for what the others send."""
GRACE_S = 1
"""Time within which those that are left say that they are."""
ANSWER_S = 5
"""Longest time that the store takes to answer."""

Value = TypeVar("Value")


class Ranks:
    """One process, which has nobody to exchange anything with.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        should_stop: whether this process was asked to stop.
        stopping: whether one of them was when the last step was computed.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.should_stop: Callable[[], bool] = lambda: False

    @property
    def stopping(self) -> bool:
        return self.should_stop()

    def is_first_to_fail(self) -> bool:
        """Say whether no other process has failed; the first one knows why, the others only that it is gone."""
        return True

    def exchange(
        self, mine: Mapping[Node, Sequence[Tensor]], nodes: Sequence[Sequence[Node]], like: Sequence[Tensor]
    ) -> dict[Node, Sequence[Tensor]]:
        """Give all ranks what each has.

        Args:
            mine: tensors by node.
            nodes: of each rank.
            like: tensors of the shapes and types that each node has.
        """
        return dict(mine)

    def gather(self, value: Value) -> list[Value]:
        """Give all ranks the value that each has, by rank."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """Give all ranks the value that the first has."""
        return value

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        """Check that a mapping is the same on all ranks.

        Raises:
            RankError: it is not; which part differs first, and where.
        """
        everybodys = self.gather(parts)
        for name in parts:
            others = [rank for rank, its_parts in enumerate(everybodys) if its_parts[name] != everybodys[0][name]]
            if others:
                raise RankError(
                    f"{name} of rank {', '.join(map(str, others))} differs from rank 0: all processes need the same "
                    f"data, "
                    "code, libraries and machine class"
                )


class GroupedRanks(Ranks):
    """The processes that torchrun started.

    Args:
        store: what all of them can write to and read.
    """

    def __init__(self, device: torch.device, store: Store) -> None:
        super().__init__()
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._device = device
        self._store = store
        self._stopping = False

    def is_first_to_fail(self) -> bool:
        return self._ask(lambda: self._store.add("failures", 1) == 1, otherwise=True)

    def _ask(self, question: Callable[[], Value], otherwise: Value) -> Value:
        """Ask the store, which may be lost, too: then nobody answers, perhaps for many minutes."""
        answers = SimpleQueue[Value]()

        def ask() -> None:
            try:
                answers.put(question())
            except RuntimeError:
                answers.put(otherwise)

        Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=GRACE_S + ANSWER_S)
        except Empty:
            return otherwise

    def _find_lost(self) -> list[int]:
        """Find the processes that do not come forward in time."""
        self._store.set(f"present-{self.rank}", "")
        time.sleep(GRACE_S)
        return [rank for rank in range(self.size) if not self._store.check([f"present-{rank}"])]

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Say which processes were lost, where an exchange fails."""
        try:
            yield
        except RuntimeError as error:
            reason = one_line(error)
            lost = self._ask(self._find_lost, otherwise=list[int]())
            who = f"rank {', '.join(map(str, lost))}" if lost else "the connection to the others"
            raise RankError(f"{who} was lost ({reason}); continue with --resume and any number of processes") from error

    @property
    def stopping(self) -> bool:
        return self._stopping

    def exchange(
        self, mine: Mapping[Node, Sequence[Tensor]], nodes: Sequence[Sequence[Node]], like: Sequence[Tensor]
    ) -> dict[Node, Sequence[Tensor]]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in like)
        sent = torch.zeros(1 + max(map(len, nodes)) * size, dtype=torch.uint8, device=self._device)
        sent[0] = self.should_stop()
        position = 1
        for node in nodes[self.rank]:
            for tensor in mine[node]:
                content = tensor.contiguous().reshape(-1).view(torch.uint8)
                sent[position : position + len(content)] = content
                position += len(content)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        with self._naming_the_lost():
            torch.distributed.all_gather(received, sent)
        self._stopping = any(bool(each[0]) for each in received)
        return {
            node: mine[node] if node in mine else _unpack(content, 1 + number * size, like)
            for content, its_nodes in zip(received, nodes, strict=True)
            for number, node in enumerate(its_nodes)
        }

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        with self._naming_the_lost():
            torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        values: list[Any] = [value]
        with self._naming_the_lost():
            torch.distributed.broadcast_object_list(values)
        found: Value = values[0]
        return found


def _unpack(content: Tensor, position: int, like: Sequence[Tensor]) -> list[Tensor]:
    tensors = []
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        values = content[position : position + size].clone().view(tensor.dtype).reshape(tensor.shape)
        tensors.append(torch.empty_like(tensor).copy_(values))
        position += size
    return tensors


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did.

    Raises:
        RankError: they are not there in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=TIMEOUT_S)
    try:
        store = _open_store(rank, size, timeout)
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
    except RuntimeError as error:
        reason = one_line(error)
        raise RankError(f"rank {rank} cannot reach the other processes ({reason}); continue with --resume") from error
    try:
        yield GroupedRanks(torch.device(device), store)
    finally:
        torch.distributed.destroy_process_group()


def _open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Open the store that torchrun has, or another launcher leaves to rank 0, at a place that nobody used before.

    Torchrun keeps its store when it starts processes anew, and in it the addresses of those that have ended.
    """
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=rank == 0 and not has_store, timeout=timeout)
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asking-{rank}", name)
        name = store.get(f"answer-{name}").decode()
        store.set(f"heard-{name}-{rank}", "")
        return PrefixStore(name, store)
    missing, deadline = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in list(missing):
            if store.check([f"heard-{name}-{other}"]):
                missing.remove(other)
            elif store.check([f"asking-{other}"]):  # perhaps one of before
                store.set(f"answer-{store.get(f'asking-{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer from rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(0.01)
    return PrefixStore(name, store)
