"""The reference: train as the student's notebook does, in plain float32 PyTorch.

Every image goes through PIL transforms and a DataLoader. This module uses nothing of cifarlab.
"""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

BATCH = 32
EPOCHS = 8


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images uint8 (N, 32, 32, 3), served as torchvision's CIFAR10 does: PIL, then transforms."""

    def __init__(self, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def network() -> nn.Sequential:
    """Return the notebook's network: three convolutions, 538,506 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Dropout2d(0.1),
        *(nn.Conv2d(128, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def train(model: nn.Sequential, pictures: Pictures) -> Iterator[int]:
    """Train `model` for all epochs; yield the number of images seen so far after every batch."""
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()
    device = next(model.parameters()).device
    seen = 0
    for _ in range(EPOCHS):
        model.train()
        running_loss = 0.0  # never read, but the notebook computes it too, and that takes time
        for images, labels in DataLoader(pictures, BATCH, shuffle=True):
            optimizer.zero_grad()
            loss = criterion(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            seen += len(labels)
            yield seen


@torch.no_grad()
def accuracy(model: nn.Sequential, pictures: Pictures) -> float:
    """Return the share of `pictures` that the network classifies correctly in evaluation mode."""
    model.eval()
    correct = 0
    for images, labels in DataLoader(pictures, BATCH):
        correct += (model(images).argmax(1) == labels).sum().item()
    return correct / len(pictures)
