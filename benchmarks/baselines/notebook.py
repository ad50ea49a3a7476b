"""The notebook's way of training CIFAR-10: what PyTorch's tutorial teaches, from the data set to per-class accuracy.

    python -m benchmarks.baselines.notebook --dataset_folder DATA [--seed 0]

PIL images through torchvision's transforms, a DataLoader with two workers, an eager loop, and two passes over the
test set (in total and by class), as in https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html. The
last line that it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torchvision import transforms

BATCH_SIZE = 4
NUM_EPOCHS = 2


class Cifar10(torchvision.datasets.CIFAR10):  # type: ignore[misc]  # torchvision ships no types
    """CIFAR-10 without the check against the published md5 sums, which a copy that went through JPEG cannot pass."""

    meta = {**torchvision.datasets.CIFAR10.meta, "md5": None}

    def _check_integrity(self) -> bool:
        return True


class Net(nn.Module):
    """The tutorial's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(F.relu(self.conv1(images)))
        features = self.pool(F.relu(self.conv2(features)))
        features = F.relu(self.fc1(torch.flatten(features, 1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(features)))
        return logits


def main() -> None:
    """Train, save, load again and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    train_set = Cifar10(arguments.dataset_folder, train=True, transform=transform)
    test_set = Cifar10(arguments.dataset_folder, train=False, transform=transform)
    train_loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        train_set, batch_size=BATCH_SIZE, shuffle=True, num_workers=2
    )
    test_loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        test_set, batch_size=BATCH_SIZE, shuffle=False, num_workers=2
    )

    network = Net()
    optimizer = optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    epoch_seconds = []
    for epoch in range(NUM_EPOCHS):
        started = time.perf_counter()
        running_loss = 0.0
        for step, (images, labels) in enumerate(train_loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
            optimizer.step()
            running_loss += loss.item()
            if step % 2000 == 1999:
                print(f"[{epoch + 1}, {step + 1:5d}] loss: {running_loss / 2000:.3f}", flush=True)
                running_loss = 0.0
        epoch_seconds.append(round(time.perf_counter() - started, 3))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cifar_net.pth"
        torch.save(network.state_dict(), path)
        network = Net()
        network.load_state_dict(torch.load(path, weights_only=True))

    started = time.perf_counter()
    correct = 0
    with torch.no_grad():
        for images, labels in test_loader:
            correct += int((network(images).argmax(1) == labels).sum())
        by_class = dict.fromkeys(test_set.classes, 0)
        for images, labels in test_loader:
            for label, prediction in zip(labels, network(images).argmax(1), strict=True):
                by_class[test_set.classes[label]] += int(label == prediction)
    print(
        json.dumps(
            {
                "accuracy": correct / len(test_set),
                "correct_by_class": by_class,
                "epoch_seconds": epoch_seconds,
                "evaluation_seconds": round(time.perf_counter() - started, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
