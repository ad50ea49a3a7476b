"""The record algorithm at its published settings, moved to a CPU: 94 % on the published CIFAR-10 in 8 epochs.

    python -m benchmarks.baselines.airbench94_muon --dataset_folder DATA [--seed 0] [--device cuda]

Written from the description in https://github.com/KellerJordan/cifar10-airbench (airbench94_muon: 2.59 s on an A100)
and Jordan: 94% on CIFAR-10 in 3.29 Seconds, 2024. What is changed for a CPU: the device, bf16 by autocast instead of
half precision, and no compiling. Seconds are counted from the data in memory to the final evaluation with its six
views. The last line that it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.data.dataset import load_snapshot

BATCH_SIZE = 2000
NUM_EPOCHS = 8
NUM_EPOCHS_OF_WHITENING_BIAS = 3
BIAS_LEARNING_RATE, HEAD_LEARNING_RATE, FILTER_LEARNING_RATE = 0.053, 0.67, 0.24
WEIGHT_DECAY = 2e-6 * BATCH_SIZE
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Group(nn.Module):
    """Convolution, pooling, norm, GELU, convolution, norm, GELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding="same", bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels, eps=1e-12, momentum=0.4)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding="same", bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=1e-12, momentum=0.4)
        for convolution, channels in ((self.conv1, in_channels), (self.conv2, out_channels)):
            nn.init.dirac_(convolution.weight.data[:channels])
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        features = F.gelu(self.norm1(F.max_pool2d(self.conv1(features), 2)))
        return F.gelu(self.norm2(self.conv2(features)))


class Net(nn.Module):
    """The record's network, widths 64, 256, 256."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T.reshape(-1, 3, 2, 2)
        self.whiten.weight.data.copy_(torch.cat([filters, -filters]))
        self.groups = nn.Sequential(Group(24, 64), Group(64, 256), Group(256, 256))
        self.head = nn.Linear(256, 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    def forward(self, images: Tensor, train_whitening_bias: bool = False) -> Tensor:
        bias = self.whiten.bias
        assert bias is not None
        features = F.conv2d(images, self.whiten.weight, bias if train_whitening_bias else bias.detach())
        features = F.max_pool2d(self.groups(F.gelu(features)), 3).flatten(1)
        logits: Tensor = self.head(features) / features.shape[1]
        return logits


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal by three Newton-Schulz iterations; the filters' norm is held."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": FILTER_LEARNING_RATE})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum"].mul_(0.6).add_(parameter.grad)
                update = parameter.grad.add(momentum, alpha=0.6).flatten(1).bfloat16()
                update /= update.norm() + 1e-7
                transposed = len(update) > update.shape[1]
                update = update.T if transposed else update
                for _ in range(3):
                    gram = update @ update.T
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = update.T if transposed else update
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"])


def crop_randomly(images: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Shift each image [N, 3, 32, 32] by up to two pixels, reflected at the edge."""
    padded = F.pad(images, (reach,) * 4, "reflect")
    size = images.shape[-1]
    shifts = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).to(images.device)
    cropped = torch.empty_like(images)
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            chosen = (shifts[:, 0] == top) & (shifts[:, 1] == left)
            cropped[chosen] = padded[chosen, :, top : top + size, left : left + size]
    return cropped


def compute_logits(network: Net, images: Tensor) -> Tensor:
    """Average the logits of six views: both mirrorings of the image, and of two shifts at half the weight."""
    padded = F.pad(images, (1,) * 4, "reflect")
    views = [(0.25, images), (0.125, padded[:, :, :32, :32]), (0.125, padded[:, :, 2:, 2:])]
    logits = [weight * (network(view).float() + network(view.flip(-1)).float()) for weight, view in views]
    return torch.stack(logits).sum(0)


def main() -> None:
    """Train once and evaluate with and without the views."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    snapshot = load_snapshot(arguments.dataset_folder)
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def prepare(part: tuple[object, object]) -> tuple[Tensor, Tensor]:
        images, labels = (torch.tensor(array).to(device) for array in part)
        scaled = (images.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last), labels

    (images, labels), (test_images, test_labels) = prepare(snapshot.train), prepare(snapshot.test)

    started = time.perf_counter()
    network = Net(images[:5000].cpu()).to(device).to(memory_format=torch.channels_last)
    filters = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    biases = [p for name, p in network.named_parameters() if "norm" in name and p.requires_grad]
    rates = [([network.whiten.bias], BIAS_LEARNING_RATE), (biases, BIAS_LEARNING_RATE)]
    rates.append(([network.head.weight], HEAD_LEARNING_RATE))
    groups = [{"params": params, "lr": lr, "weight_decay": WEIGHT_DECAY / lr} for params, lr in rates]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True)
    muon = Muon(filters)
    highest = [(group, group["lr"]) for optimizer in (sgd, muon) for group in optimizer.param_groups]

    flipped = (torch.rand(len(images), generator=generator) < 0.5).to(device)
    images = torch.where(flipped.reshape(-1, 1, 1, 1), images.flip(-1), images)
    steps_per_epoch = len(images) // BATCH_SIZE
    num_steps, bias_steps = NUM_EPOCHS * steps_per_epoch, NUM_EPOCHS_OF_WHITENING_BIAS * steps_per_epoch
    step, epoch_seconds = 0, []
    for epoch in range(NUM_EPOCHS):
        epoch_started = time.perf_counter()
        varied = crop_randomly(images, generator)
        varied = varied.flip(-1) if epoch % 2 else varied
        order = torch.randperm(len(varied), generator=generator).to(device)
        network.train()
        for batch in torch.split(order[: steps_per_epoch * BATCH_SIZE], BATCH_SIZE):
            train_bias = step < bias_steps
            for position, (group, lr) in enumerate(highest):
                length = bias_steps if position == 0 else num_steps
                group["lr"] = lr * max(1 - step / length, 0)
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                logits = network(varied[batch], train_bias)
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.2, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
            for optimizer in (sgd, muon):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
        epoch_seconds.append(round(time.perf_counter() - epoch_started, 3))
        print(f"epoch {epoch + 1}: {epoch_seconds[-1]:.1f} s", flush=True)

    def compute_accuracy(with_views: bool) -> float:
        network.eval()
        parts = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            for batch in torch.split(test_images, BATCH_SIZE):
                parts.append(compute_logits(network, batch) if with_views else network(batch))
        return float((torch.cat(parts).argmax(1) == test_labels).float().mean())

    accuracy = compute_accuracy(with_views=True)
    seconds = time.perf_counter() - started
    facts = {"accuracy": accuracy, "accuracy_single_view": compute_accuracy(with_views=False)}
    print(json.dumps({**facts, "training_seconds": round(seconds, 3), "epoch_seconds": epoch_seconds}))


if __name__ == "__main__":
    main()
