"""A whole training step, or an inference, as one CUDA graph, which the CPU launches at once.

A small network's step is dozens of short kernels. Launching them one by one can take the CPU longer than running them
takes the GPU. A replayed graph costs one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet import private
from fastlenet.selection import logger

__all__ = ["GraphedInference", "GraphedTrainStep"]


class GraphedTrainStep:
    """A training step that replays as a CUDA graph, with the results of the plain loop.

    A call with a batch does the following, and returns the loss:

        optimizer.zero_grad()
        loss = loss(model(*batch[:-1]), batch[-1])
        loss.backward()
        optimizer.step()

    The first batch is trained on eagerly. This makes ready what a capture needs: compiled kernels, library handles, the
    optimizer's state. The second batch is captured, which computes nothing, and then replayed. Later batches are
    replayed. So after every call parameters, optimizer state and generator states are those of the plain loop, and
    gradients are in ``.grad``.

    A graph reads and writes the same memory each time, with the same numbers. Therefore:

    * A batch of another shape or dtype than the example, such as the last of an epoch, is trained on eagerly.
    * The next step is eager, and the one after it is captured again, if an option of the optimizer changed (a learning
      rate), parameters moved or were frozen, the model changed its mode, or the optimizer loaded a state. A capture
      costs far more than a replay. For a learning rate that changes at every step, give the optimizer a tensor on the
      GPU and change it in place; Adam takes one, and SGD with ``fused=True``.
    * Everything else that a step depends on must be in tensors that keep their place.
    * Python code in the model or the loss does not run on a replay, hooks and counters included. It must not wait for
      the GPU, as ``.item()`` does.

    A CPU has no graphs. There every step runs eagerly, and `graphed` is False.

    Args:
        model: called with all tensors of a batch except the last.
        loss: takes the model's output and the last tensor of a batch, and returns a scalar.
        optimizer: steps the model's parameters. On a GPU it must be made with ``capturable=True`` if its class has that
            option, as Adam has; SGD needs none.
        example_inputs: a batch that gives the device, shapes and dtypes of the batches to replay. It is not trained on.

    Raises:
        ValueError: if `example_inputs` has fewer than two tensors, if they and the optimizer's parameters are not on
            one device, or if the optimizer is not capturable on a GPU.
        RuntimeError: from the second step on a GPU, if the optimizer keeps part of its state on the CPU, or if the step
            cannot be captured. The message says why.

    Examples:
        >>> import torch, fastlenet
        >>> model, loss = fastlenet.LeNet(), torch.nn.functional.cross_entropy
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> images, labels = torch.randn(8, 1, 32, 32), torch.randint(10, (8,))
        >>> batch = images, labels
        >>> step = fastlenet.graphs.GraphedTrainStep(model, loss, optimizer, batch)
        >>> losses = [step(images, labels) for _ in range(3)]
        >>> step.graphed  # these tensors are on the CPU
        False
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        example_inputs: Sequence[Tensor],
    ) -> None:
        if len(example_inputs) < 2:
            raise ValueError(
                f"example_inputs must be a batch: the model's inputs and then the target, got {len(example_inputs)} "
                "tensors"
            )
        self._model, self._loss, self._optimizer, self._device = model, loss, optimizer, example_inputs[0].device
        self._graph = _graph("GraphedTrainStep", self._step, example_inputs, self._parameters())
        if self._graph is None:
            return
        if not all(group.get("capturable", True) for group in optimizer.param_groups):
            name = type(optimizer).__name__
            raise ValueError(
                f"{name} counts its steps on the CPU, which a CUDA graph cannot: make it with {name}(..., "
                "capturable=True)"
            )
        # A loaded state is in new tensors: what was captured steps the old ones.
        optimizer.register_load_state_dict_post_hook(self._graph.forget)

    @property
    def graphed(self) -> bool:
        """Whether batches like the example are replayed as a CUDA graph. False on a CPU, where every step is eager."""
        return self._graph is not None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one training step.

        Args:
            *batch: tensors as in `example_inputs`. If their shapes differ, the step is eager.

        Returns:
            The loss before the step: a detached scalar on the device, with memory of its own.
        """
        if self._graph is None or not self._graph.takes(batch):
            return self._step(*batch)[0]
        loss, grads = self._graph(batch, self._what_a_graph_fixes(), self._prepare_capture)
        for parameter, grad in zip(self._parameters(), grads, strict=True):
            # An eager step in between, or a user's zero_grad, has put something else there.
            if parameter.grad is not grad:
                parameter.grad = grad
        return loss.clone()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _step(self, *batch: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._model(*batch[:-1]), batch[-1])
        loss.backward()
        self._optimizer.step()
        return loss.detach(), [parameter.grad for parameter in self._parameters()]

    def _prepare_capture(self) -> None:
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if getattr(value, "device", None) != self._device and isinstance(value, (int, float, Tensor)):
                    raise RuntimeError(
                        f"{type(self._optimizer).__name__} keeps its state {name!r} on the CPU, which a CUDA graph "
                        "does not see: choose an optimizer with capturable=True, or SGD"
                    )
        # Gradients allocated while capturing belong to the graph, which writes them anew at each replay.
        self._optimizer.zero_grad(set_to_none=True)

    def _what_a_graph_fixes(self) -> list[Any]:
        """Numbers and addresses that a captured step goes on to use, whatever becomes of them outside."""
        fixed: list[Any] = [self._model.training]
        for group in self._optimizer.param_groups:
            for name, option in group.items():
                if name == "params":
                    fixed += [(parameter.data_ptr(), parameter.requires_grad) for parameter in option]
                    continue
                for value in option if isinstance(option, (tuple, list)) else (option,):  # Adam's betas are a pair
                    in_place = isinstance(value, Tensor) and value.device == self._device
                    fixed.append(value.data_ptr() if in_place else float(value) if isinstance(value, Tensor) else value)
        return fixed


class GraphedInference:
    """A model's forward that replays as a CUDA graph, without gradients.

    It is for small batches, which wait for Python. A call returns what ``model(*inputs)`` returns under
    `torch.no_grad`. The first call runs eagerly and makes ready what a capture needs. The second is captured and
    replayed. Later calls are replayed. Outputs have memory of their own.

    A graph reads the same memory each time. Therefore:

    * Inputs of another shape, dtype or device than the example run eagerly.
    * The next call is eager, and the one after it is captured again, if parameters or buffers moved, a module changed
      its mode, or autocast was switched. A replay sees parameters that changed in place.
    * Python code in the model does not run on a replay, hooks and counters included. It must not wait for the GPU, as
      ``.item()`` does.

    A CPU has no graphs. There every call runs eagerly, and `graphed` is False.

    Args:
        model: called with the given tensors. It may return tensors nested in tuples, lists and dicts.
        *example_inputs: inputs that give the device, shapes and dtypes to replay.

    Raises:
        ValueError: if `example_inputs` is empty, or if they and the model's parameters are not on one device.
        RuntimeError: from the second call on a GPU, if the forward cannot be captured. The message says why.

    Examples:
        >>> import torch, fastlenet
        >>> images = torch.randn(1, 1, 32, 32)
        >>> infer = fastlenet.graphs.GraphedInference(fastlenet.LeNet().eval(), images)
        >>> infer(images).shape, infer.graphed
        (torch.Size([1, 10]), False)
    """

    def __init__(self, model: nn.Module, *example_inputs: Tensor) -> None:
        if not example_inputs:
            raise ValueError("example_inputs must hold at least one tensor")
        self._model, self._kind = model, example_inputs[0].device.type
        self._graph = _graph("GraphedInference", model, example_inputs, [*model.parameters(), *model.buffers()])

    @property
    def graphed(self) -> bool:
        """Whether inputs like the example are replayed as a CUDA graph. False on a CPU."""
        return self._graph is not None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """Return the model's output for `inputs`, without gradients."""
        if self._graph is None or not self._graph.takes(inputs):
            return self._model(*inputs)
        output = self._graph(inputs, self._what_a_graph_fixes())
        return private.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)

    def _what_a_graph_fixes(self) -> list[Any]:
        """Addresses and modes that a captured forward goes on to use, whatever becomes of them outside."""
        kind = self._kind
        fixed: list[Any] = [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
        for module in self._model.modules():
            fixed.append(module.training)
            for kept in (module._parameters, module._buffers):
                fixed += [None if tensor is None else tensor.data_ptr() for tensor in kept.values()]
        return fixed


DEVICES = ("cuda",)
"""The kinds of device that have graphs."""


def _graph(
    owner: str, function: Callable[..., Any], example: Sequence[Tensor], others: Sequence[Tensor]
) -> _Graph | None:
    """Make the graph of a function of tensors like `example`; None if their device has no graphs."""
    devices = {tensor.device for tensor in (*example, *others)}
    if len(devices) > 1:
        raise ValueError(f"the example and the parameters must be on one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    if device.type not in DEVICES:
        logger.debug("%s runs eagerly: there are no CUDA graphs on %s", owner, device)
        return None
    return _Graph(function, example, device)


class _Graph:
    """A function that runs eagerly at its first call, is captured at its second, and replays from then on."""

    def __init__(self, function: Callable[..., Any], example: Sequence[Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._places = [torch.empty_like(tensor) for tensor in example]
        self.forget()

    def forget(self, *_: Any) -> None:
        """Start anew: the next call is eager."""
        self._fixed: list[Any] | None = None

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors may be copied to the places that the graph reads."""
        alike = attrgetter("shape", "dtype", "device")
        return [*map(alike, tensors)] == [*map(alike, self._places)]

    def __call__(self, tensors: Sequence[Tensor], fixed: list[Any], prepare: Callable[[], None] = lambda: None) -> Any:
        """Return the function's result, whose memory the next replay writes anew.

        Args:
            tensors: that it `takes`.
            fixed: what a graph goes on to use as it was captured. If this changes, the call is eager.
            prepare: is called before a capture, and raises if the function cannot be captured.
        """
        # Both to warm up and to capture from the same memory: kernels are compiled for an address's alignment too.
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        if fixed != self._fixed:
            self._fixed, self._captured = fixed, None
            return self._on_a_side_stream()
        if self._captured is None:
            prepare()
            self._captured = self._capture()
        graph, result = self._captured
        graph.replay()
        return result

    def _on_a_side_stream(self) -> Any:
        """Run the function as a capture will: not on the default stream."""
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._function(*self._places)
        current.wait_stream(stream)
        for tensor in private.tree_leaves(result):
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
        return result

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record the GPU's work of the function, which is not done now, and its result's memory."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on: a data loader's pins memory, which a stricter mode forbids to the whole process.
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                return graph, self._function(*self._places)
        except RuntimeError as error:
            # The end of a capture that has failed is an error of its own, which came on top of the first.
            raise RuntimeError(
                "this cannot be captured as a CUDA graph: something in it waits for the GPU (.item(), .cpu(), "
                f"printing) or allocates outside PyTorch's memory pool; first complaint: {error.__context__ or error}"
            ) from error
