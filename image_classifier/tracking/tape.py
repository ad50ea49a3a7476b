"""Digests of all intermediate results of a step, to find the first difference between two runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from image_classifier.tracking.identity import compute_tensor_digest
from image_classifier.training.watching import Phase, Result

Key = tuple[int, int, int]
"""Where a result stands in its step: the stage, the shard, and the position there."""

MAX_KEPT_BYTES = 2**30
"""Of the tensors whose values a tape holds; of the others it has the digests, and a second tape the one wanted."""

NOWHERE: Key = (-1, 0, 0)
"""Wanted by a tape that keeps digests alone."""

_STAGES: dict[Phase, int] = {"state before": 0, "batch": 0, "forward": 1, "backward": 1, "gradient": 2, "update": 3}
_SHARDS = 1


class Tape:
    """The results of one step.

    Args:
        expected: digests of another tape: of each shard and stage, the first tensor that differs is kept.
        wanted: the one tensor to keep.

    Attributes:
        results: what was computed.
        digests: of the tensors.
        kept: tensors themselves.
        batch: images, labels, and what else the step was taken on.
    """

    def __init__(self, expected: Mapping[Key, str] | None = None, wanted: Key | None = None) -> None:
        self.results: dict[Key, Result] = {}
        self.digests: dict[Key, str] = {}
        self.kept: dict[Key, Tensor] = {}
        self.batch: dict[str, Tensor] = {}
        self._expected = expected
        self._wanted = wanted
        self._positions: Counter[tuple[int, int]] = Counter()
        self._differing: set[tuple[int, int]] = set()
        self._num_bytes = 0

    @property
    def keeps_all(self) -> bool:
        """Whether it keeps tensors of every stage, up to a limit."""
        return self._expected is None and self._wanted is None

    def note(self, result: Result, tensor: Tensor) -> None:
        """Note the next result of its stage and shard."""
        place = (_STAGES[result.phase], result.shard or 0)
        key = (*place, self._positions[place])
        self._positions[place] += 1
        self.results[key], self.digests[key] = result, compute_tensor_digest(tensor)
        if result.phase == "batch":
            self.batch[result.layer] = tensor.detach().cpu().clone()
        if self._is_to_keep(key, tensor):
            self.kept[key] = tensor.detach().cpu().clone()

    def _is_to_keep(self, key: Key, tensor: Tensor) -> bool:
        if self._wanted is not None:
            return key == self._wanted
        if self._expected is not None:
            if key[:2] in self._differing or self._expected.get(key) == self.digests[key]:
                return False
            self._differing.add(key[:2])
            return True
        self._num_bytes += tensor.nbytes
        return self._num_bytes <= MAX_KEPT_BYTES


def find_first_difference(first: Tape, second: Tape, *, sees_shards: bool = True) -> Key | None:
    """Find the first result that is not the same on two tapes, of those that both have.

    Args:
        sees_shards: whether both cut the batch into the same shards, so that these can be compared.
    """
    for key in sorted(first.digests.keys() & second.digests.keys()):
        if key[0] == _SHARDS and not sees_shards:
            continue
        if first.digests[key] != second.digests[key]:
            return key
    return None
