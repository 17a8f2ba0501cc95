"""LeNet from its definition to its first weight updates, with fused layers: ``python examples/tutorial.py``.

The steps are those of PyTorch's classic "neural networks" tutorial. Nothing in them changes when the layers are fused:
the network is an ``nn.Module``, its operators are nodes of autograd's graph, and its parameters are ordinary ones.
"""

from __future__ import annotations

import torch
from torch import nn

import fastlenet


def main() -> None:
    """Walk through the steps, printing what each one shows."""
    torch.manual_seed(0)

    print("A network is a module with parameters:")
    network = fastlenet.LeNet()
    print(network)
    parameters = list(network.parameters())
    print(f"{len(parameters)} parameters; conv1.weight is {parameters[0].size()}")

    print("\nIt maps a batch of 32x32 images to ten numbers each:")
    image = torch.randn(1, 1, 32, 32)
    output = network(image)
    print(output)
    print(f"a single image without a batch dimension works as in stock PyTorch: {network(image[0]).shape}")

    print("\nGradients accumulate, so clear them before a backward pass, here of a random gradient:")
    network.zero_grad()
    output.backward(torch.randn(1, 10))
    print(f"conv1.weight.grad now has norm {network.conv1.weight.grad.norm():.4f}")

    print("\nA loss is one number that tells how far the output is from a target:")
    target = torch.randn(10).view(1, -1)
    criterion = nn.MSELoss()
    loss = criterion(network(image), target)
    print(loss)

    print("\nThe graph of a whole batch's loss leads back through the fused operators to the parameters:")
    loss_of_batch = criterion(network(image.expand(64, -1, -1, -1)), target.expand(64, -1))
    node, depth = loss_of_batch.grad_fn, 0
    while node is not None:
        print(f"{'  ' * depth}{type(node).__name__}")
        # The first input that leads on; weights and biases end in AccumulateGrad, the image needs no gradient.
        onward = [n for n, _ in node.next_functions if n is not None and type(n).__name__ != "AccumulateGrad"]
        inner = [n for n in onward if n.next_functions and type(n).__name__ != "TBackward0"]
        node, depth = (inner[0] if inner else None), depth + 1

    print("\nBack-propagating the loss fills the gradients:")
    network.zero_grad()
    print(f"conv1.bias.grad before backward: {network.conv1.bias.grad}")
    loss.backward()
    print(f"conv1.bias.grad after backward:  {network.conv1.bias.grad}")

    print("\nThe simplest update is weight -= learning_rate * gradient:")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.01 * parameter.grad
    print(f"loss after it: {criterion(network(image), target).item():.6f}")

    print("\ntorch.optim has better rules; each works as on any module:")
    for name, optimizer in {
        "SGD": torch.optim.SGD(network.parameters(), lr=0.01),
        "Nesterov": torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True),
        "Adam": torch.optim.Adam(network.parameters(), lr=0.001),
        "RMSProp": torch.optim.RMSprop(network.parameters(), lr=0.0001),
    }.items():
        optimizer.zero_grad()
        loss = criterion(network(image), target)
        loss.backward()
        optimizer.step()
        print(f"{name:9}loss {loss.item():.6f} -> {criterion(network(image), target).item():.6f}")


if __name__ == "__main__":
    main()
