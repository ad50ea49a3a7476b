"""Tests, before a run starts, whether third-party networks and optimizers meet the requirements of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from image_classifier.errors import ImageClassifierError, ModelError, SettingsError
from image_classifier.model.classifier import Classifier
from image_classifier.model.hooks import ArrangesWeights
from image_classifier.plugins import explain
from image_classifier.settings import TrainingSettings
from image_classifier.storage import scratch_folder
from image_classifier.tracking.checkpoint import Checkpoints
from image_classifier.training.draws import OF_THE_OPTIMIZER, Draws
from image_classifier.training.engine import Eager
from image_classifier.training.optimizer import build_plugged_optimizer
from image_classifier.training.shards import Shard, share_parameters

NUM_IMAGES = NUM_STEPS = 4

logger = logging.getLogger(__name__)


def check_network(
    build: Callable[..., Classifier], settings: TrainingSettings, num_classes: int, title: str | None = None
) -> None:
    """Check that a network is deterministic given the seed, supports the resolutions, returns logits and has no state.

    Args:
        build: builds a new instance, from the run's seed or from its argument `seed`.
        settings: resolved settings.
        title: name in messages.

    Raises:
        ModelError: it does not; the message has the reason.
    """
    title, size = title or f"--model {settings.model}", 0
    try:
        classifier, again = (build().to(settings.device) for _ in range(2))
        if not are_equal(classifier.state_dict().values(), again.state_dict().values()):
            raise ModelError(
                f"{title} has other weights each time that it is built: draw weights only from torch's default "
                "generator, which has the run's seed"
            )
        if settings.instruction_set == "portable":
            check_weights(classifier, build(seed=settings.seed ^ 1), title)
        generator = torch.Generator().manual_seed(0)
        shape = (2, NUM_IMAGES, 3, classifier.image_size, classifier.image_size)
        images, others = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(settings.device)
        for size in sorted(set(settings.image_sizes)):
            fault = find_fault_of_answers(classifier, images, others, size, num_classes)
            fault = fault or find_fault_of_steps(classifier, images, others, size, settings)
            if fault:
                raise ModelError(f"{title} {fault}")
    except ImageClassifierError:
        raise
    except Exception as error:  # third-party code
        logger.debug("%s fails", title, exc_info=error)
        raise ModelError(f"{title} fails on {NUM_IMAGES} images of {size} pixels: {explain(error)}") from error


def check_weights(classifier: Classifier, other: Classifier, title: str) -> None:
    """Check that the initial weights of a portable run do not depend on the processor.

    Args:
        other: the same network with another seed.

    Raises:
        SettingsError: torch draws some weights, by code that depends on the processor.
    """
    if not isinstance(classifier.network, ArrangesWeights):
        raise SettingsError(
            f"--instruction_set portable: torch draws the weights of {title}, by code that depends on the processor; "
            "add arrange_weights(), which requests weights from this package, or choose native"
        )
    layers = {name for name, layer in classifier.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    values = other.state_dict()
    for name, value in classifier.state_dict().items():
        if name.rpartition(".")[0] not in layers and not torch.equal(value, values[name]):
            raise SettingsError(
                f"--instruction_set portable: torch draws {name.removeprefix('network.')} of {title}, by code that "
                "depends on the processor; set it in arrange_weights(), or choose native"
            )


@torch.no_grad()
def find_fault_of_answers(
    classifier: Classifier, images: Tensor, others: Tensor, size: int, num_classes: int
) -> str | None:
    """Return what is wrong with the logits of images, uint8 [N, 3, H, W], in evaluation mode; None if nothing is."""
    classifier.eval()
    before = [value.clone() for value in classifier.state_dict().values()]

    def answer(batch: Tensor) -> Any:
        return classifier.network(classifier.scale(batch, size))

    logits = answer(images)
    expected = [len(images), num_classes]
    if not isinstance(logits, Tensor):
        return f"gives {type(logits).__name__} instead of a tensor of logits {expected}"
    if list(logits.shape) != expected or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        return f"gives {kind} {list(logits.shape)} for images of {size} pixels instead of logits {expected}"
    if not bool(logits.isfinite().all()):
        return "gives logits that are not finite"
    answer(others)
    if not torch.equal(logits, answer(images)):
        return "gives other answers to the same images: it remembers something, or draws numbers in evaluation"
    if not torch.allclose(logits[:1], answer(images[:1]), rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        return "gives logits that depend on the other images of the batch, in evaluation"
    if not are_equal(before, classifier.state_dict().values()):
        return "changes its buffers in evaluation"
    return None


def find_fault_of_steps(
    classifier: Classifier, images: Tensor, others: Tensor, size: int, settings: TrainingSettings
) -> str | None:
    """Return what is wrong with the gradients of a training step; None if nothing is."""
    replica = share_parameters(classifier).train()
    eager, labels = Eager([replica], settings), torch.zeros(len(images), dtype=torch.int64, device=images.device)
    start = [buffer.clone() for buffer in replica.buffers()]
    results: list[list[Tensor]] = []
    for batch in (images, others, images):
        for buffer, value in zip(replica.buffers(), start, strict=True):
            buffer.copy_(value)
        try:
            loss, _, gradients = eager.compute(0, Shard(batch, labels, size, 0.5))
        except RuntimeError as error:
            if "not have been used" in str(error):
                return "has parameters that take no part in its answers: leave them out, or set requires_grad_(False)"
            raise
        results.append([loss, *(each for each in gradients if each is not None), *replica.buffers()])
        results[-1] = [each.clone() for each in results[-1]]
    if not are_equal(results[0], results[2]):
        return (
            "gives other gradients in the same step: it remembers something beside its buffers, or draws numbers from "
            "another generator than torch's"
        )
    saved = replica.state_dict().keys()
    for (name, buffer), value in zip(replica.named_buffers(), start, strict=True):
        if name not in saved and not torch.equal(buffer, value):
            return f"changes {name.removeprefix('network.')}, a buffer that no checkpoint holds: make it persistent"
    return None


def are_equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Return whether tensors are pairwise equal in every bit, including NaN."""
    pairs = list(zip(some, others, strict=True))
    return all(one.shape == other.shape and torch.equal(_get_bits(one), _get_bits(other)) for one, other in pairs)


def _get_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


Build = Callable[[list[nn.Parameter], TrainingSettings], torch.optim.Optimizer]


def check_optimizer(build: Build, settings: TrainingSettings) -> None:
    """Check that an optimizer follows the schedule, and that a checkpoint contains its whole state.

    It trains a small network for a few steps, with and without a checkpoint between them.

    Raises:
        SettingsError: it does not; the message has the reason.
    """
    title = f"--optimizer {settings.optimizer}"
    train = partial(take_steps, build, settings)
    try:
        whole, again, half = train(range(NUM_STEPS)), train(range(NUM_STEPS)), train(range(NUM_STEPS // 2))
        resumed, idle = train(range(NUM_STEPS // 2, NUM_STEPS), half), train(range(1), half, part=0.0)
    except ImageClassifierError:
        raise
    except Exception as error:  # third-party code
        logger.debug("%s fails", title, exc_info=error)
        raise SettingsError(f"{title} fails in a step: {explain(error)}") from error
    fault = None
    if not are_equal(whole[0], again[0]):
        fault = "gives other weights each time: it remembers something, or draws from another generator than torch's"
    elif are_equal(whole[0], half[0]):
        fault = "changes no weights"
    elif not are_equal(whole[0], resumed[0]):
        fault = "gives other weights after a checkpoint: its state_dict() lacks something that a step needs"
    elif not are_equal(half[0], idle[0]):
        fault = 'changes weights at a learning rate of 0: it must take group["lr"], which the schedule sets'
    if fault:
        raise SettingsError(f"{title} {fault}")


def take_steps(
    build: Build,
    settings: TrainingSettings,
    steps: range,
    before: tuple[list[Tensor], dict[str, Any]] | None = None,
    part: float = 1.0,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Take steps with gradients that depend on the step number.

    Args:
        before: weights and optimizer state to continue from.
        part: factor of the learning rate.

    Returns:
        The weights, and the optimizer state after saving and loading a checkpoint.
    """
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    parameters = list(network.parameters())
    for number, parameter in enumerate(parameters):
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn if before is None else before[0][number].clone()
    optimizer = build_plugged_optimizer(build, parameters, settings)
    if before is not None:
        optimizer.load_state_dict(before[1])
    for number in steps:
        generator.manual_seed(number + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * part * (1 - number / NUM_STEPS)
        with Draws(settings.seed, number, OF_THE_OPTIMIZER, torch.device("cpu")):
            optimizer.step()
    with scratch_folder() as folder:
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(1, {"optimizer": optimizer.state_dict()}, 1)
        try:
            state: dict[str, Any] = checkpoints.load(1)["optimizer"]
        except ModelError as error:
            title = f"--optimizer {settings.optimizer}"
            raise SettingsError(
                f"{title} has values in its state_dict() that checkpoints cannot store: {error}"
            ) from error
    return [parameter.detach().clone() for parameter in parameters], state
