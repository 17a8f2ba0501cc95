"""Well-known networks, written from their papers in the many ways in which people write such sites.

``width`` divides the number of channels of the large ones, so that tests are quick; their structure is the papers'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TutorialNet(nn.Module):
    """LeNet-5 as PyTorch's tutorials have it, in functions (LeCun and others, 1998)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.max_pool2d(F.relu(self.conv1(images)), (2, 2))
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        hidden = F.relu(self.fc1(torch.flatten(maps, 1)))
        return self.fc3(F.relu(self.fc2(hidden)))


class MnistNet(nn.Module):
    """The network of PyTorch's MNIST example: the first convolution has no pool, dropout layers follow both sites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.drop1, self.drop2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv1(images))
        maps = self.drop1(F.max_pool2d(F.relu(self.conv2(maps)), 2))
        hidden = self.drop2(F.relu(self.fc1(maps.flatten(1))))
        return F.log_softmax(self.fc2(hidden), dim=1)


class OldMnistNet(nn.Module):
    """The same example as it was for years: relu after the pool, dropout inside a site, `training` as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(F.max_pool2d(self.conv1(images), 2))
        maps = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(maps)), 2))
        hidden = F.relu(self.fc1(maps.view(-1, 320)))
        return self.fc2(F.dropout(hidden, training=self.training))


class CifarNet(nn.Module):
    """The network of PyTorch's CIFAR-10 tutorial: one pooling module serves both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 5), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.conv2(self.pool(self.conv1(images).relu())).relu_())
        return self.fc3(torch.relu(self.fc2(torch.relu_(self.fc1(maps.flatten(1))))))


class AlexNet(nn.Module):
    """Krizhevsky, one tower (2014): overlapping pools, relu in place, dropout before the linear layers."""

    def __init__(self, width: int = 1, classes: int = 1000) -> None:
        super().__init__()
        a, b, c, d, hidden = (channels // width for channels in (64, 192, 384, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(d, d, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.average = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(d * 36, hidden), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.average(self.features(images)), 1))


class VGG11(nn.Module):
    """Simonyan and Zisserman, configuration A (2014); with batch norm before each relu if asked for."""

    def __init__(self, width: int = 1, classes: int = 1000, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
            for wide in stage:
                layers.append(nn.Conv2d(channels, wide // width, 3, padding=1))
                layers += [nn.BatchNorm2d(wide // width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = wide // width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d((7, 7))
        hidden = 4096 // width
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.average(self.features(images)).flatten(1))


class Fire(nn.Module):
    """SqueezeNet's module: squeeze to few channels, expand by 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.left, self.right = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        squeezed = self.relu(self.squeeze(maps))
        return torch.cat([self.relu(self.left(squeezed)), self.relu(self.right(squeezed))], 1)


class SqueezeNet(nn.Module):
    """Iandola and others, version 1.0 (2016): pools with ceil_mode, most of them after a concatenation."""

    def __init__(self, width: int = 1, classes: int = 1000) -> None:
        super().__init__()
        fires, channels = [], 96 // width
        for squeeze, expand in ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)):
            fires.append(Fire(channels, squeeze // width, expand // width))
            channels = 2 * expand // width
        self.features = nn.Sequential(
            nn.Conv2d(3, 96 // width, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
            *fires[:3], nn.MaxPool2d(3, 2, ceil_mode=True),
            *fires[3:7], nn.MaxPool2d(3, 2, ceil_mode=True),
            fires[7],
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(channels, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(images)), 1)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps))))) + maps)


class ResNetStem(nn.Module):
    """The beginning of ResNet-18 (He and others, 2015), its first two blocks, and a classifier."""

    def __init__(self, width: int = 1, classes: int = 1000) -> None:
        super().__init__()
        channels = 64 // width
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(channels), Block(channels))
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.fc(self.layer1(maps).mean((2, 3)))


class Nested(nn.Sequential):
    """A Sequential of Sequentials, sites within and across them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(4, 6, 3), nn.Identity(), nn.MaxPool2d(2, 1))),
            nn.ReLU(),
            nn.Flatten(),
            nn.Sequential(nn.Linear(6 * 3 * 3, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))),
        )


class FunctionNet(nn.Module):
    """Everything as functions on parameters, with keyword arguments and padding by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(4, 1, 3, 3) / 3), nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(5, 64) / 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.conv2d(images, self.kernel, bias=self.shift, padding="same", groups=2)
        maps = torch.max_pool2d(maps.relu(), kernel_size=[3, 3], stride=[2, 2], padding=[1, 1])
        return torch.relu(F.linear(maps.flatten(1), self.matrix))


class StatementNet(nn.Module):
    """relu in place as a statement of its own, whose value nobody takes: a function, a method, a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.MaxPool2d(2)
        self.fc1, self.relu, self.fc2 = nn.Linear(54, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv1(images)
        F.relu(maps, inplace=True)
        maps = self.pool(self.conv2(self.pool(maps)))
        maps.relu_()
        hidden = self.fc1(maps.flatten(1))
        self.relu(hidden)
        return self.fc2(hidden) + hidden[:, :3]


@dataclass(frozen=True)
class Case:
    """A network, its input, and how many sites can be fused: (convolutions, linear maps) in training and in eval."""

    make: type[nn.Module]
    shape: tuple[int, ...]
    training: tuple[int, int]
    inference: tuple[int, int]
    options: tuple[tuple[str, object], ...] = ()

    def __call__(self) -> nn.Module:
        """Make the network, its statistics and batch-norm parameters off their initial zeros and ones."""
        model = self.make(**dict(self.options))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, -1.0, 1.0),  # negative ones too: they turn a maximum into a minimum
                    (module.bias, -0.5, 0.5),
                ):
                    nn.init.uniform_(tensor, low, high)
        return model


CASES = {
    "tutorial": Case(TutorialNet, (3, 1, 32, 32), (2, 2), (2, 2)),
    "mnist": Case(MnistNet, (2, 1, 28, 28), (1, 1), (1, 1)),
    "old_mnist": Case(OldMnistNet, (4, 1, 28, 28), (1, 1), (2, 1)),
    "cifar": Case(CifarNet, (3, 3, 32, 32), (2, 2), (2, 2)),
    "alexnet": Case(AlexNet, (2, 3, 96, 96), (3, 2), (3, 2), (("width", 8), ("classes", 10))),
    "vgg11": Case(VGG11, (2, 3, 64, 64), (5, 2), (5, 2), (("width", 8), ("classes", 10))),
    "vgg11_bn": Case(VGG11, (2, 3, 64, 64), (0, 2), (5, 2), (("width", 8), ("classes", 10), ("batch_norm", True))),
    "squeezenet": Case(SqueezeNet, (2, 3, 84, 84), (1, 0), (1, 0), (("width", 4), ("classes", 10))),
    "resnet_stem": Case(ResNetStem, (2, 3, 56, 56), (0, 0), (1, 0), (("width", 4), ("classes", 10))),
    "nested": Case(Nested, (3, 2, 14, 14), (2, 1), (2, 1)),
    "functions": Case(FunctionNet, (3, 2, 8, 8), (1, 1), (1, 1)),
    "statements": Case(StatementNet, (3, 1, 18, 18), (2, 1), (2, 1)),
}
