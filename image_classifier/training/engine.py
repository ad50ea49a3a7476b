"""Computes the gradients of a step: with torch alone, or with the package's kernels where torch is slow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.kernels.library import load_kernels
from image_classifier.plugins import is_own
from image_classifier.settings import TrainingSettings
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.draws import Draws
from image_classifier.training.portable_steps import choose_arithmetic
from image_classifier.training.ranks import Ranks
from image_classifier.training.replay import Program, Recorder, Replay
from image_classifier.training.shards import Engine, Shard, ShardResult, Shards, share_parameters
from image_classifier.training.threads import Threads
from image_classifier.training.watching import Watch

SMALL_BATCH = 64
"""Images of a step, up to which its operations are written down and repeated without autograd."""

logger = logging.getLogger(__name__)


def build_engine(
    classifier: nn.Module,
    settings: TrainingSettings,
    threads: Threads | None = None,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
) -> Shards:
    """Build what computes the gradients of a batch, with the settings' resolved engine, precision and shards.

    Args:
        threads: that compute the shards; by default as many as this process may use cores.
        ranks: the processes that do so; by default this one alone.
        watch: shown the operations of torch that shards are computed by.
    """
    threads, ranks = threads or Threads(arithmetic=choose_arithmetic(settings.instruction_set)), ranks or Ranks()
    replicas = [share_parameters(classifier) for _ in range(settings.count_shards())]
    eager = Eager(replicas, settings, watch)
    engine: Engine = eager
    if settings.engine == "compiled":
        compiled = CompiledSmall if settings.batch_size <= SMALL_BATCH else CompiledLarge
        engine = compiled(eager, replicas, settings)
    return Shards(classifier, replicas, engine, settings.batch_size, threads, ranks)


def check_operations(classifier: nn.Module, settings: TrainingSettings, targets: Tensor | None = None) -> None:
    """Check before a portable run that there are kernels for all that its steps take, by a step of two images.

    Args:
        targets: float32 [C, C], what an image of each class is trained towards, if that is not its class alone.

    Raises:
        SettingsError: there are not.
    """
    if settings.instruction_set != "portable":
        return
    arithmetic = choose_arithmetic("portable")
    side = settings.image_size
    images, labels = torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    eager = Eager([share_parameters(classifier).train()], settings)
    for size in sorted(set(settings.image_sizes)):
        with arithmetic():
            eager.compute(0, Shard(images, labels, size, 0.5, None if targets is None else targets[labels]))


class Eager:
    """Computes shards by torch and autograd."""

    def __init__(self, replicas: Sequence[nn.Module], settings: TrainingSettings, watch: Watch | None = None) -> None:
        self._replicas = replicas
        self._watch = watch or Watch()
        self._parameters = list(replicas[0].parameters())
        self._is_bf16 = settings.precision == "bf16"
        self._label_smoothing = settings.label_smoothing
        self._seed = None if is_own("model", settings.model) else settings.seed

    def prepare(self, shards: Sequence[Shard], threads: Threads) -> None:
        """There is nothing in common."""

    def compute(self, replica: int, shard: Shard) -> ShardResult:
        """Compute a shard."""
        with self._watch.shard(shard, self._replicas[replica]):
            return self._compute(replica, shard)

    def _compute(self, replica: int, shard: Shard) -> ShardResult:
        # Autocast's cache of narrowed weights is one for all threads.
        device = shard.images.device
        with (
            nullcontext() if self._seed is None else Draws(self._seed, shard.step, shard.number, device),
            torch.autocast(device.type, torch.bfloat16, enabled=self._is_bf16, cache_enabled=False),
        ):
            logits = self._replicas[replica](shard.images, shard.size)
        if shard.targets is None:
            loss = F.cross_entropy(logits, shard.labels, label_smoothing=self._label_smoothing)
        else:  # in which the smoothing is; in operations that all engines and the portable kernels have
            loss = -(F.log_softmax(logits, dim=1) * shard.targets).sum() / len(shard.labels)
        num_correct = (logits.detach().argmax(dim=1) == shard.labels).sum()
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        # A gradient to begin with, instead of the product, would load SymPy: 0.3 s.
        weighted = loss * shard.part if shard.part < 1 else loss
        gradients = iter(torch.autograd.grad(weighted, trained))
        return loss.detach(), num_correct, [next(gradients) if p.requires_grad else None for p in self._parameters]


Shape = tuple[int, int, float, int]
"""What decides which operations a shard takes: its number of images, their size, its part of the batch, and how many
parameters are trained."""


class Compiled:
    """Computes shards by operations that were written down once for each shape, those that kernels take by these.

    What was written down is not trusted until it has given, a step later, the bits that autograd gives.

    Args:
        eager: computes a shard the first time.
    """

    is_small: bool

    def __init__(self, eager: Eager, replicas: Sequence[nn.Module], settings: TrainingSettings) -> None:
        self._eager = eager
        self._kernels = load_kernels(choose_kernels(settings.instruction_set))
        self._is_portable = settings.instruction_set == "portable"
        self._parameters = list(replicas[0].parameters())
        self._buffers = [list(replica.buffers()) for replica in replicas]
        self._untrusted: set[Shape] = set()

    def find_shape(self, shard: Shard) -> Shape:
        """Find what a program is for."""
        num_trained = sum(parameter.requires_grad for parameter in self._parameters)
        return len(shard.labels), shard.size, shard.part, num_trained

    def get_inputs(self, replica: int, shard: Shard) -> list[Tensor]:
        """Get what a program is called with."""
        return [*_list_data(shard), *self._parameters, *self._buffers[replica]]

    def record(self, replica: int, shard: Shard) -> tuple[ShardResult, Recorder]:
        """Compute a shard with autograd and kernels, and write down how."""
        inputs = self.get_inputs(replica, shard)
        state = inputs[len(_list_data(shard)) :]
        with Recorder(inputs, state, self._kernels, is_small=self.is_small, is_portable=self._is_portable) as recorder:
            result = self._eager.compute(replica, shard)
        return result, recorder

    def compute_anew(self, replica: int, shard: Shard) -> ShardResult:
        """Compute a shard of a shape that has no program: by torch alone where operations cannot be repeated, as those
        that draw numbers; with the kernels of the first time where they can, but give something else."""
        if self._is_portable or self.find_shape(shard) in self._untrusted:
            return self.record(replica, shard)[0]
        return self._eager.compute(replica, shard)

    def is_repeated_rightly(self, replica: int, shard: Shard, repeat: Callable[[], ShardResult]) -> bool:
        """Say whether a repetition gives, and leaves in the buffers, what autograd does; these stay as they are."""
        buffers = self._buffers[replica]
        before = [buffer.clone() for buffer in buffers]
        found: list[list[Tensor]] = []
        for number in range(2):
            loss, num_correct, gradients = self.record(replica, shard)[0] if number == 0 else repeat()
            found.append([each.clone() for each in (loss, num_correct, *gradients, *buffers) if each is not None])
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
        pairs = zip(*found, strict=True)
        is_equal = all(torch.equal(_get_bits(one), _get_bits(other)) for one, other in pairs)
        if not is_equal:
            self._untrusted.add(self.find_shape(shard))
            logger.warning(
                "the network runs different operations at each step, so autograd computes its steps, which is slower"
            )
        return is_equal


def _list_data(shard: Shard) -> list[Tensor]:
    return [shard.images, shard.labels, *([] if shard.targets is None else [shard.targets])]


def _get_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class CompiledSmall(Compiled):
    """Where finding out what to do takes longer than doing it: each copy of the network has programs of its own, whose
    kernels write to memory that stays, and follow each other in one call."""

    is_small = True

    def __init__(self, eager: Eager, replicas: Sequence[nn.Module], settings: TrainingSettings) -> None:
        super().__init__(eager, replicas, settings)
        self.replays: list[dict[Shape, Replay | None]] = [{} for _ in replicas]
        self._trusted: set[tuple[int, Shape]] = set()

    def prepare(self, shards: Sequence[Shard], threads: Threads) -> None:
        """There is nothing in common."""

    def compute(self, replica: int, shard: Shard) -> ShardResult:
        """Compute a shard."""
        shape, replays = self.find_shape(shard), self.replays[replica]
        if shape not in replays:
            before = [buffer.clone() for buffer in self._buffers[replica]]
            (loss, num_correct, gradients), recorder = self.record(replica, shard)
            replays[shape] = recorder.build_replay([loss, num_correct, *gradients])
            if replays[shape] is None:
                for buffer, value in zip(self._buffers[replica], before, strict=True):
                    buffer.copy_(value)
                return self.compute_anew(replica, shard)
            return loss.clone(), num_correct.clone(), gradients  # repetitions write to the same memory
        replay = replays[shape]
        if replay is None:
            return self.compute_anew(replica, shard)

        def repeat() -> ShardResult:
            with torch.no_grad():
                loss, num_correct, *gradients = replay(*self.get_inputs(replica, shard))
            assert loss is not None and num_correct is not None
            return loss.clone(), num_correct.clone(), gradients

        if (replica, shape) not in self._trusted:
            if not self.is_repeated_rightly(replica, shard, repeat):
                replays[shape] = None
            self._trusted.add((replica, shape))
            return self.compute(replica, shard)
        return repeat()


class CompiledLarge(Compiled):
    """Where the arithmetic takes the time: all copies of the network have one program for a shape, and what depends on
    the parameters alone is computed once a step."""

    is_small = False

    def __init__(self, eager: Eager, replicas: Sequence[nn.Module], settings: TrainingSettings) -> None:
        super().__init__(eager, replicas, settings)
        self.programs: dict[Shape, Program | None] = {}
        self._trusted: set[Shape] = set()
        self._prepared: dict[Shape, list[Tensor]] = {}

    def prepare(self, shards: Sequence[Shard], threads: Threads) -> None:
        """Compute what depends on the parameters alone."""
        self._prepared = {}
        for shape, shard in {self.find_shape(shard): shard for shard in shards}.items():
            is_new = shape not in self.programs
            if is_new:
                (loss, num_correct, gradients), recorder = self.record(0, shard)
                self.programs[shape] = recorder.build_program([loss, num_correct, *gradients], self._parameters)
            program = self.programs[shape]
            if program is None:
                continue
            self._prepared[shape] = self._compute_prepared(program, threads)
            if not is_new and shape not in self._trusted:
                self._trusted.add(shape)
                if not self.is_repeated_rightly(0, shard, lambda: self.compute(0, shard)):
                    self.programs[shape] = None

    def _compute_prepared(self, program: Program, threads: Threads) -> list[Tensor]:
        def compute(number: int) -> list[Tensor]:
            prepare = program.prepare[number]
            with torch.no_grad():
                return [] if prepare is None else prepare(self._parameters[number])

        return [tensor for part in threads.map(compute, range(len(self._parameters))) for tensor in part]

    def compute(self, replica: int, shard: Shard) -> ShardResult:
        """Compute a shard."""
        shape = self.find_shape(shard)
        program = self.programs[shape]
        if program is None:
            return self.compute_anew(replica, shard)
        with torch.no_grad():
            loss, num_correct, *gradients = program.replay(*self.get_inputs(replica, shard), *self._prepared[shape])
        assert loss is not None and num_correct is not None
        return loss, num_correct, gradients
