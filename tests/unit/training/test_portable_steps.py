"""Operations of portable runs: near what torch gives, by kernels alone, and refused where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from image_classifier.errors import SettingsError
from image_classifier.kernels.library import load_kernels
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import NETWORKS
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.engine import check_operations
from image_classifier.training.optimizer import orthogonalize
from image_classifier.training.portable_steps import PortableMode, is_exact
from tests.golden import CASES, FOLDER, list_operations, make_case

KERNELS = load_kernels(choose_kernels("portable"))
RANDOM = torch.Generator().manual_seed(0)


class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Lets torch compute nothing that could come out in several ways."""

    def __torch_dispatch__(self, called: Any, types: object, arguments: Any = (), options: Any = None) -> Any:
        assert is_exact(called, arguments, options or {}), f"torch computed {called}"
        return called(*arguments, **(options or {}))


def make(*shape: int, channels_last: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=RANDOM)
    return values.to(memory_format=torch.channels_last) if channels_last else values


def change(values: Tensor, how: Callable[[Tensor], object]) -> Tensor:
    values = values.clone()
    how(values)
    return values


def differentiate(compute: Callable[[Tensor], Tensor], values: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        given = values.detach().requires_grad_()
        return torch.autograd.grad(compute(given), given, gradient)[0]


HOW = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
aten = torch.ops.aten
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "convolution of few channels": (lambda x, w: F.conv2d(x, w, padding=1), (make(2, 3, 9, 7), make(5, 3, 3, 3))),
    "convolution with a bias": (F.conv2d, (make(2, 6, 14, 14), make(16, 6, 5, 5), make(16))),
    "convolution by tiles": (lambda x, w: F.conv2d(x, w, padding=1), (make(40, 8, 8, 8), make(10, 8, 3, 3))),
    "gradient of images": (
        lambda g, x, w: aten.convolution_backward(g, x, w, None, *HOW, [True, False, False])[0],
        (make(2, 5, 9, 7), make(2, 3, 9, 7), make(5, 3, 3, 3)),
    ),
    "gradient of filters": (
        lambda g, x, w: aten.convolution_backward(g, x, w, None, *HOW, [False, True, False])[1],
        (make(2, 5, 9, 7), make(2, 3, 9, 7), make(5, 3, 3, 3)),
    ),
    "convolution with strides": (lambda x, w: F.conv2d(x, w, None, 2, 1), (make(40, 8, 9, 8), make(10, 8, 3, 3))),
    "convolution of the stem": (lambda x, w: F.conv2d(x, w, None, 2, 3), (make(2, 3, 17, 18), make(5, 3, 7, 7))),
    "shortcut with strides": (lambda x, w: F.conv2d(x, w, None, (3, 2)), (make(2, 3, 9, 8), make(5, 3, 1, 1))),
    "gradient of images with strides": (
        lambda x, w, g: differentiate(lambda given: F.conv2d(given, w, None, (2, 3), 1), x, g),
        (make(2, 3, 9, 7), make(5, 3, 3, 3), make(2, 5, 5, 3)),
    ),
    "gradient of filters with strides": (
        lambda x, w, g: differentiate(lambda given: F.conv2d(x, given, None, 2, 3), w, g),
        (make(2, 3, 8, 9), make(5, 3, 7, 7), make(2, 5, 4, 5)),
    ),
    "pooling of windows that overlap": (lambda x: F.max_pool2d(x, 3, 2, 1), (make(2, 3, 8, 9),)),
    "pooling of windows that do not": (lambda x: F.max_pool2d(x, (3, 1)), (make(2, 3, 8, 9),)),
    "gradient of pooling": (
        lambda x, g: differentiate(lambda given: F.max_pool2d(given, 3, 2, 1), x, g),
        (make(2, 3, 8, 9).round(), make(2, 3, 4, 5)),
    ),
    "mean of no images": (lambda x: x.mean((2, 3)), (make(0, 3, 2, 2),)),
    "GELU of rows": (F.gelu, (make(3, 7),)),
    "gradient of GELU of rows": (aten.gelu_backward, (make(3, 7), make(3, 7))),
    "batch norm": (
        lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, training=False),
        (make(4, 6, 3, 3), make(6), make(6), make(6), make(6).abs()),
    ),
    "resizing": (
        lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", antialias=True),
        (make(2, 3, 8, 8),),
    ),
    "product": (torch.mm, (make(200, 300), make(200, 300).T)),
    "product of transposed": (torch.mm, (make(30, 20).T, make(40, 30).T)),
    "product and sum": (lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), (make(9), make(5, 7), make(7, 9))),
    "orthogonal": (orthogonalize, (make(24, 50),)),
    "orthogonal, high": (orthogonalize, (make(50, 24),)),
    "sum": (torch.sum, (make(3, 5, 4),)),
    "sum of columns": (lambda x: x.sum(0, keepdim=True), (make(30, 5),)),
    "sum of some": (lambda x: x.sum((0, 2)), (make(3, 5, 4, 2, channels_last=True),)),
    "sum of a part": (lambda x: x[:, ::2].sum(1), (make(3, 8),)),
    "mean": (torch.mean, (make(5, 6),)),
    "mean of pixels": (lambda x: x.mean((2, 3)), (make(5, 6, 3, 3, channels_last=True),)),
    "greatest of pixels": (lambda x: x.amax((2, 3), keepdim=True), (make(5, 6, 3, 3, channels_last=True),)),
    "norm": (lambda x: x.norm(), (make(5, 6, 3, 3, channels_last=True),)),
    "scaling of channels": (lambda x, y: (x - y) / y, (make(2, 3, 16, 16, channels_last=True), make(1, 3, 1, 1))),
    "scaling of planes": (lambda x, y: (x - y) / y, (make(2, 3, 5, 5), make(1, 3, 1, 1))),
    "sum in another layout": (torch.add, (make(2, 3, 5, 5), make(2, 3, 5, 5, channels_last=True))),
    "sum with a number": (lambda x: x + 0.1, (make(7),)),
    "outer difference": (torch.sub, (make(7, 1), make(1, 5))),
    "times truth": (lambda x, y: x * (y > 0), (make(7, 1), make(7, 5))),
    "over a count": (lambda x: x / torch.tensor(3), (make(7),)),
    "change in place": (lambda x, y: change(x, lambda z: z.add_(y, alpha=-0.3).mul_(y).div_(3.0)), (make(9), make(9))),
    "change of a diagonal": (lambda x: change(x, lambda z: z.diagonal().add_(2.0)), (make(4, 4),)),
    "probabilities": (lambda x: x.softmax(1), (make(4, 9),)),
    "loss": (
        lambda x: F.cross_entropy(x, torch.arange(len(x)) % 3, label_smoothing=0.1),
        (make(8, 5),),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_give_what_torch_gives(operation: str) -> None:
    compute, tensors = OPERATIONS[operation]
    expected = compute(*(tensor.double() for tensor in tensors))
    with torch.no_grad(), Refuse(), PortableMode(KERNELS):  # type: ignore[no-untyped-call]  # likewise
        found = compute(*tensors)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    limit = 5e-6 * max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("compute", "tensors", "named"),
    [
        (torch.sin, (make(3),), "aten.sin.default of float32 [3]"),
        (torch.add, (make(3).double(), make(3).double()), "aten.add.Tensor of float64 [3], float64 [3]"),
        (torch.mm, (make(3, 3).double(), make(3, 3).double()), "aten.mm.default of float64 [3, 3]"),
        (torch.mul, (make(3), make(1).double()), "aten.mul.Tensor of float32 [3], float64 [1]"),
        (F.conv2d, (make(1, 2, 5, 5).double(), make(1, 2, 3, 3).double()), "aten.convolution.default of float64"),
        (lambda x: x.norm(), (make(3).double(),), "aten.linalg_vector_norm.default of float64 [3]"),
        (lambda x: x.softmax(1), (make(3, 3).double(),), "aten._softmax.default of float64 [3, 3]"),
        (lambda x, w: F.conv2d(x, w, dilation=2), (make(1, 2, 5, 5), make(1, 2, 3, 3)), "aten.convolution.default"),
        (lambda x: F.max_pool2d(x, 3, dilation=2), (make(1, 2, 6, 6),), "aten.max_pool2d_with_indices.default"),
        (lambda x: x.sum(0, dtype=torch.float64), (make(3),), "aten.sum.dim_IntList"),
        (lambda x: x.sum(0, dtype=torch.float32), (torch.arange(3),), "aten.sum.dim_IntList of int64 [3]"),
        (lambda x: x.norm(1), (make(3),), "aten.linalg_vector_norm.default"),
        (lambda x: change(x, lambda y: y.exp_()), (make(3),), "aten.exp_.default"),
    ],
)
def test_what_no_kernel_is_for_is_named(
    compute: Callable[..., Tensor], tensors: tuple[Tensor, ...], named: str
) -> None:
    with (
        torch.no_grad(),
        Refuse(),  # type: ignore[no-untyped-call]  # likewise
        PortableMode(KERNELS),
        pytest.raises(SettingsError, match="--instruction_set portable has no kernel for") as error,
    ):
        compute(*tensors)
    assert named in str(error.value)


def test_a_network_without_kernels_is_refused_before_it_trains() -> None:
    class Odd(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.linear = nn.Linear(3, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            return self.linear(images.amax((2, 3)).sinh())  # type: ignore[no-any-return]  # a module's call

    classifier = Classifier(Odd(10), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(SettingsError, match="no kernel for aten.sinh.default of float32"):
        check_operations(classifier, make_case("resnet"))


def test_each_network_of_the_catalogue_has_a_golden_run() -> None:
    assert {make_case(case).model for case in CASES} == set(NETWORKS)


@pytest.mark.parametrize("case", CASES)
def test_each_operation_of_each_networks_step_has_its_kernels(case: str) -> None:
    expected = json.loads((FOLDER / "operations.json").read_text())[case]
    assert list_operations(case) == expected
