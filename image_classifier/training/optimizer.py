"""The optimizers and their schedule."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from image_classifier.errors import SettingsError
from image_classifier.kernels.library import Arguments, Chain, Kernels, load_kernels
from image_classifier.plugins import explain, is_own, load
from image_classifier.settings import TrainingSettings
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.portable_steps import choose_arithmetic
from image_classifier.training.threads import Threads

logger = logging.getLogger(__name__)

# Of airbench94_muon, for the loss summed over the batch; what is no filter gets SGD of these.
BIAS_LEARNING_RATE = 0.053
HEAD_LEARNING_RATE = 0.67
VECTOR_MOMENTUM = 0.85

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients that drive singular values between 0.5 and 1.5 in few iterations (Jordan: Muon, 2024)."""
NUM_ITERATIONS = 3


def build_optimizer(
    classifier: nn.Module, settings: TrainingSettings, threads: Threads | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer over all trained parameters; weight decay spares what has one dimension under SGD.

    Each group has its highest learning rate as `initial_lr`. Body and head are groups of their own where they have
    rates of their own.

    Args:
        threads: that share Muon's work; by default as many as this process may use cores.

    Raises:
        SettingsError: one of another package cannot be built, or is none for these parameters.
    """
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    if not is_own("optimizer", settings.optimizer):
        return build_plugged_optimizer(load("optimizer", settings.optimizer), parameters, settings)
    is_portable = settings.instruction_set == "portable"
    kernels = load_kernels(choose_kernels("portable")) if is_portable else None
    if settings.optimizer == "muon":
        threads = threads or Threads(arithmetic=choose_arithmetic(settings.instruction_set))
        return _build_muon(parameters, settings, threads, kernels)
    parts = [(settings.learning_rate, parameters)]
    if settings.body_learning_rate is not None:
        head = set(classifier.head.parameters())  # type: ignore[union-attr]  # a classifier's, by the arguments
        body = [parameter for parameter in parameters if parameter not in head]
        parts = [(settings.body_learning_rate, body), (settings.learning_rate, [p for p in parameters if p in head])]
    groups = []
    for rate, part in parts:
        groups.append({"params": [p for p in part if p.ndim >= 2], "lr": rate, "weight_decay": settings.weight_decay})
        groups.append({"params": [p for p in part if p.ndim < 2], "lr": rate, "weight_decay": 0.0})
    optimizer = SGD(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,
        kernels=kernels,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def build_plugged_optimizer(
    build: Callable[..., torch.optim.Optimizer], parameters: list[nn.Parameter], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Build an optimizer of another package, by `build(parameters, settings)`.

    The learning rate that a group begins with is its highest: each step sets `lr` to a part of it, by the schedule.

    Raises:
        SettingsError: it cannot be built, or is none for these parameters.
    """
    title = f"--optimizer {settings.optimizer}"
    try:
        optimizer = build(parameters, settings)
    except Exception as error:  # it is somebody's code
        logger.debug("%s cannot be built", title, exc_info=error)
        raise SettingsError(f"{title} cannot be built: {explain(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingsError(f"{title} returns {type(optimizer).__name__}; it must return a torch.optim.Optimizer")
    if {id(each) for group in optimizer.param_groups for each in group["params"]} != set(map(id, parameters)):
        raise SettingsError(f"{title} must optimize exactly the {len(parameters)} parameters that it was given")
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise SettingsError(f"{title} has a parameter group without lr, which the schedule needs")
        group["initial_lr"] = float(group["lr"])
    return optimizer


def _build_muon(
    parameters: list[nn.Parameter], settings: TrainingSettings, threads: Threads, kernels: Kernels | None
) -> Muon:
    def build_group(dimensions: int, learning_rate: float) -> dict[str, Any]:
        lr = learning_rate * settings.batch_size  # the loss is a mean, the published rates are for a sum
        return {
            "params": [p for p in parameters if p.ndim == dimensions],
            "initial_lr": lr,
            "momentum": VECTOR_MOMENTUM,
            "weight_decay": settings.weight_decay / lr,
            "orthogonalize": False,
        }

    filters = {
        "params": [p for p in parameters if p.ndim == 4],
        "initial_lr": settings.learning_rate,
        "momentum": settings.momentum,
        "weight_decay": 0.0,  # the filters' norm is fixed
        "orthogonalize": True,
    }
    groups = [filters, build_group(2, HEAD_LEARNING_RATE), build_group(1, BIAS_LEARNING_RATE)]
    return Muon(groups, torch.bfloat16 if settings.precision == "bf16" else torch.float32, threads, kernels)


class Light(torch.optim.Optimizer):
    """An optimizer without the compiler, which torch's import (1.2 s) only to have it leave these methods alone."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class SGD(Light, torch.optim.SGD):
    """Torch's SGD, its fused step called without what torch does around it, which takes as long as a small network.

    Args:
        kernels: what takes the steps instead.
    """

    def __init__(self, groups: list[dict[str, Any]], *, kernels: Kernels | None = None, **options: Any) -> None:
        super().__init__(groups, **options)
        self._kernels = kernels
        self._calls: dict[tuple[int, ...], tuple[list[Arguments], Chain]] = {}  # by the parameters' ids

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            buffers = [self._get_buffer(parameter) for parameter in parameters] if group["momentum"] else []
            if self._kernels is not None:
                self._step_by_kernels(self._kernels, group, parameters, buffers)
                continue
            torch._fused_sgd_(
                parameters,
                [parameter.grad for parameter in parameters],
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
            )

    step.hooked = True  # type: ignore[attr-defined]  # torch would put its profiler's hook around it

    def _step_by_kernels(
        self, kernels: Kernels, group: dict[str, Any], parameters: list[Tensor], buffers: list[Tensor]
    ) -> None:
        """Take a step of a group's parameters, in one call whose arguments are made once."""
        key = tuple(map(id, parameters))
        if key not in self._calls:
            numbers = {"is_nesterov": group["nesterov"], "factor": group["momentum"], "learning_rate": 0.0}
            numbers |= {"weight_decay": group["weight_decay"], "parameter": 0, "gradient": 0, "momentum": 0}
            calls = [kernels.prepare("sgd", **numbers, count=parameter.numel()) for parameter in parameters]
            self._calls[key] = calls, kernels.chain([("sgd", call) for call in calls])
        calls, chain = self._calls[key]
        gradients = [_lay_out_like(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for call, parameter, gradient in zip(calls, parameters, gradients, strict=True):
            call.parameter, call.gradient = parameter.data_ptr(), gradient.data_ptr()
            call.learning_rate = group["lr"]
        for call, buffer in zip(calls, buffers, strict=False):
            call.momentum = buffer.data_ptr()
        chain()

    def _get_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _lay_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Lay a gradient out in memory as its parameter is."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class Muon(Light):
    """SGD with Nesterov momentum whose updates of convolution filters are made orthogonal (Jordan: Muon, 2024).

    The filters' norm is held at the square root of their number before each step, which takes the place of weight
    decay; it has no effect on a network that normalises what a filter gives.
    """

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype, threads: Threads, kernels: Kernels | None = None
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.dtype = dtype
        self._orthogonalize = orthogonalize if kernels is None else partial(orthogonalize_by_kernel, kernels)
        self._threads = threads

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step."""
        groups = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        list(self._threads.map(self._update, [each for each in groups if each[0].grad is not None]))

    def _update(self, parameter_and_group: tuple[Tensor, dict[str, Any]]) -> None:
        with torch.no_grad(), self._threads.arithmetic():
            self._step_parameter(*parameter_and_group)

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum = parameter.grad, state["momentum_buffer"]
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        torch.add(gradient, momentum, alpha=group["momentum"], out=momentum)
        update = gradient.add(momentum, alpha=group["momentum"])
        if group["orthogonalize"]:
            norm = parameter.norm()
            parameter.mul_(torch.full_like(norm, math.sqrt(len(parameter))) / norm)
            filters = update.movedim(1, 3)  # as they stand in memory; the order of the columns is all one
            update = self._orthogonalize(filters.flatten(1).to(self.dtype)).view_as(filters).movedim(3, 1)
        parameter.add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix [M, N] near 1 by Newton-Schulz iterations in its own precision.

    An iteration multiplies the matrix by a polynomial of its Gram matrix, so that it can be told from that matrix alone
    what all of them together multiply by.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    factor = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    for number in range(NUM_ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial @ factor
        if number < NUM_ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    result: Tensor = factor @ wide
    return result if len(matrix) <= matrix.shape[1] else result.T


def orthogonalize_by_kernel(kernels: Kernels, matrix: Tensor) -> Tensor:
    """Do as `orthogonalize` does in single precision, by a kernel."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    out = torch.empty(wide.shape)
    a, b, c = NEWTON_SCHULZ
    sizes = {"rows": len(wide), "columns": wide.shape[1], "num_iterations": NUM_ITERATIONS}
    addresses = {"out": out.data_ptr(), "matrix": wide.data_ptr(), "scratch": 0}
    arguments = kernels.prepare("orthogonalize", **addresses, **sizes, matrix_strides=wide.stride(), a=a, b=b, c=c)
    scratch = torch.empty(kernels.count_scratch("orthogonalize", arguments), dtype=torch.uint8)
    arguments.scratch = scratch.data_ptr()
    kernels.call("orthogonalize", arguments)
    return out if len(matrix) <= matrix.shape[1] else out.T


def compute_schedule(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Compute which part of its highest learning rate a step has, counted from 0."""
    if settings.schedule == "constant":
        return 1.0
    peak = settings.warmup_fraction * num_steps
    if step < peak:
        return (step + 1) / (peak + 1)
    return (num_steps - step) / max(num_steps - peak, 1)
