"""The notebook's way, the yardstick: one image at a time through PIL transforms and a DataLoader, plain float32 PyTorch.

Knows nothing of cifarlab but the arrays of `data/`.
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
    """Images uint8 (N, 32, 32, 3) as torchvision's CIFAR10 hands them out: PIL, then the transforms."""

    def __init__(self, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def network() -> nn.Sequential:
    """Three convolutions, 538,506 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(128, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def epochs(model: nn.Sequential, pictures: Pictures) -> Iterator[int]:
    """Train and yield after every batch the number of images seen."""
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()
    seen = 0
    for _ in range(EPOCHS):
        model.train()
        running_loss = 0.0
        for images, labels in DataLoader(pictures, BATCH, shuffle=True):
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            seen += len(labels)
            yield seen


@torch.no_grad()
def accuracy(model: nn.Sequential, pictures: Pictures) -> float:
    """Share of `pictures` that the network, in evaluation mode, gets right."""
    model.eval()
    correct = 0
    for images, labels in DataLoader(pictures, BATCH):
        correct += (model(images).argmax(1) == labels).sum().item()
    return correct / len(pictures)
