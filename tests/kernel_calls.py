"""Calls of kernels as steps of the networks make them, repeated by other builds of the kernels, perhaps emulated."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from image_classifier.kernels.builder import TARGETS
from image_classifier.kernels.library import Arguments, Kernels, load_kernels, split_name
from image_classifier.model.catalog import build_classifier
from image_classifier.model.residual import ResNet18
from image_classifier.plugins import NETWORKS
from image_classifier.settings import TrainingSettings
from image_classifier.training.determinism import choose_kernels
from image_classifier.training.optimizer import NEWTON_SCHULZ, NUM_ITERATIONS, build_optimizer
from image_classifier.training.portable_steps import PortableMode
from image_classifier.training.threads import Threads

GIVEN, EARLIER, SCRATCH = range(3)
"""Kinds of memory, as `kernel_driver.c` has them."""


@dataclass
class Recording:
    """Calls of kernels, and what their memory held afterwards.

    Attributes:
        calls: as `kernel_driver.c` reads them.
        expected: what it is to write, call by call.
        names: of the kernels, call by call.
    """

    calls: list[bytes] = field(default_factory=list)
    expected: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    num_blocks: int = 0
    laid_out: dict[int, int] = field(default_factory=dict)  # memory whose layout is the library's own, by address


class RecordingMode(PortableMode):  # type: ignore[no-untyped-call]  # torch ships its base without types
    """Computes as a portable run does, and writes down each call of a kernel."""

    def __init__(self, kernels: Kernels, recording: Recording, *, is_small: bool) -> None:
        super().__init__(kernels, is_small=is_small)
        self._recording = recording

    def call(
        self, kernel: str, arguments: Arguments, written: Mapping[str, Tensor], read: Mapping[str, Tensor]
    ) -> None:
        record_call(self._kernels, kernel, arguments, {**written, **read}, self._recording)


def record_call(
    kernels: Kernels, kernel: str, arguments: Arguments, tensors: Mapping[str, Tensor], recording: Recording
) -> None:
    """Call a kernel and write down how."""
    blocks, kept = [], []
    seen: dict[int, int] = {}  # what is changed in its place is given once
    for name, tensor in tensors.items():
        place = struct.pack("<Q", getattr(type(arguments), name).offset)
        if name == "scratch":
            blocks.append(place + struct.pack("<Q", SCRATCH))
            recording.laid_out[tensor.data_ptr()] = recording.num_blocks
        elif tensor.data_ptr() in seen:
            blocks.append(place + struct.pack("<QQ", EARLIER, seen[tensor.data_ptr()]))
        elif tensor.dtype == torch.uint8 and tensor.data_ptr() in recording.laid_out and name == "filters":
            blocks.append(place + struct.pack("<QQ", EARLIER, recording.laid_out[tensor.data_ptr()]))
        else:
            content = _read_memory(tensor)
            blocks.append(place + struct.pack("<QQ", GIVEN, len(content)) + content)
            kept.append((recording.num_blocks, tensor, len(content)))
            seen[tensor.data_ptr()] = recording.num_blocks
        recording.num_blocks += 1
    base, kind = split_name(kernel)
    has_scratch = kernels.has_scratch(kernel)
    head = b"".join(map(_pack, (kernel.encode(), f"{base}_scratch{kind}".encode() if has_scratch else b"")))
    before = bytes(arguments)
    kernels.call(kernel, arguments)
    wanted = b"".join(struct.pack("<QQ", which, size) for which, _, size in kept)
    call = [head, _pack(before), struct.pack("<Q", len(blocks)), *blocks, struct.pack("<Q", len(kept)), wanted]
    recording.calls.append(b"".join(call))
    recording.expected.append(b"".join(_read_memory(tensor) for _, tensor, _ in kept))
    recording.names.append(kernel)


def _pack(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _read_memory(tensor: Tensor) -> bytes:
    """Read all memory that a tensor's numbers lie in."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return b""
    return tensor.detach().as_strided((span,), (1,)).view(torch.uint8).numpy().tobytes()


def record_steps() -> Recording:
    """Record a step and an evaluation of each network, in both layouts where they are small, and steps of both
    optimizers. Of ResNet-18, whose weights would fill the memory, it is the stem: the rest is as in the wide one."""
    kernels, recording = load_kernels(choose_kernels("portable")), Recording()
    generator = np.random.default_rng(0)
    for name in sorted(NETWORKS.keys() - {"resnet18", "resnet18_imagenet"}):
        how = {"input_mean": (0.5,) * 3, "input_std": (0.25,) * 3, "seed": 1}
        classifier = build_classifier(name, 7, **how)
        num_images = 66 if name == "airbench_small" else 3  # enough for tiles, and not
        images = torch.from_numpy(generator.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8))
        classifier.initialize_from(images.numpy())
        labels = torch.arange(num_images) % 7
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        for is_small in (True, False) if name in ("lenet", "airbench_small", "resnet") else (False,):
            size = 32 if name == "lenet" else 18
            with RecordingMode(kernels, recording, is_small=is_small):
                logits = classifier.train()(images, size)
                (logits.detach().argmax(dim=1) == labels).sum()
                loss = F.cross_entropy(logits, labels, label_smoothing=0.1 * is_small)
                gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad(), RecordingMode(kernels, recording, is_small=is_small):
                classifier.eval()(images[:1]).softmax(dim=1)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if name in ("lenet", "airbench_small"):
            _record_optimizer(name, classifier, kernels, recording)
    stem = ResNet18(7, has_imagenet_stem=True)
    with RecordingMode(kernels, recording, is_small=False):
        features = F.max_pool2d(stem.bn1(stem.conv1(images.float())), 3, 2, 1)
        torch.autograd.grad(features.sum(), (stem.conv1.weight, stem.bn1.weight))
    left, right = torch.from_numpy(generator.standard_normal((2, 300, 300), dtype=np.float32))
    with RecordingMode(kernels, recording, is_small=False):
        torch.addmm(right[:50, :70], left[:50], right.T[:, :70], beta=-0.5, alpha=2)
    return recording


def _record_optimizer(name: str, classifier: torch.nn.Module, kernels: Kernels, recording: Recording) -> None:
    recipe = "notebook" if name == "lenet" else "quick"
    settings = TrainingSettings.from_recipe(recipe, instruction_set="portable")
    threads = Threads(1, lambda: RecordingMode(kernels, recording, is_small=False))
    optimizer = build_optimizer(classifier, settings, threads)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    if name != "lenet":
        matrix = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
        out, (a, b, c) = torch.empty(9, 40), NEWTON_SCHULZ
        tensors = {"out": out, "matrix": matrix, "scratch": torch.empty(2**20, dtype=torch.uint8)}
        numbers = {"rows": 9, "columns": 40, "num_iterations": NUM_ITERATIONS, "a": a, "b": b, "c": c}
        addresses = {field: tensor.data_ptr() for field, tensor in tensors.items()}
        arguments = kernels.prepare("orthogonalize", **addresses, **numbers, matrix_strides=(40, 1))
        record_call(kernels, "orthogonalize", arguments, tensors, recording)
        optimizer.step()
        return
    for parameter in classifier.parameters():
        assert parameter.grad is not None
        momentum = torch.full_like(parameter, 0.01)
        tensors = {"parameter": parameter, "gradient": parameter.grad, "momentum": momentum}
        numbers = {"is_nesterov": True, "learning_rate": 0.1, "factor": 0.9, "weight_decay": 0.01}
        addresses = {field: tensor.data_ptr() for field, tensor in tensors.items()}
        arguments = kernels.prepare("sgd", **addresses, **numbers, count=parameter.numel())
        record_call(kernels, "sgd", arguments, tensors, recording)


def build_driver(folder: Path, target: str) -> Path:
    """Build the program that repeats calls."""
    program = folder / f"driver-{target}"
    source = Path(__file__).parent / "kernel_driver.c"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[target][0], "-O1", str(source)]
    subprocess.run([*command, "-o", str(program), "-ldl"], check=True)
    return program


def repeat_calls(recording: Recording, program: Sequence[str], library: Path) -> list[str]:
    """Repeat calls by another library; return the names of the kernels that give other bytes."""
    answer = subprocess.run([*program, str(library)], input=b"".join(recording.calls), capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr.decode()
    others, position = [], 0
    for name, expected in zip(recording.names, recording.expected, strict=True):
        if answer.stdout[position : position + len(expected)] != expected:
            others.append(name)
        position += len(expected)
    assert position == len(answer.stdout)
    return others
