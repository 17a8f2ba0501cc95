"""Who computes: fastlenet and its rivals, each in its best honest form, bound to the same data.

An `Implementation` is a model in one of three forms (fused by fastlenet, stock, or stock's own partly fused library
calls), a memory layout, and a way to run it: eagerly, compiled, or replayed from a CUDA graph. `Call` binds one to a
comparison's data and is what gets checked and timed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlenet
from bench.workloads import (
    BACKWARD,
    BOTH,
    FORWARD,
    KERNEL,
    TRAIN_STEP,
    ConvCase,
    Data,
    LeNetCase,
    LinearCase,
    Results,
    Work,
    parity_sets,
)
from fastlenet.training.loop import classification_loss

FUSED, STOCK, LIBRARY = "fused", "stock", "library"

# So small that the weights stay what they were: every step of every implementation does the same work.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Implementation:
    """One way to compute a work.

    Attributes:
        name: as it stands in the results.
        form: `FUSED` (fastlenet), `STOCK`, or `LIBRARY` (``cudnn_convolution_relu`` + max-pool and
            ``_addmm_activation``, which have no derivative: forward only).
        memory_format: of four-dimensional parameters and data; they are laid out before the clock starts.
        compile_mode: torch.compile's mode, or None.
        graphed: replay a CUDA graph, captured per set of data, where others call from Python.
        gpu_only: cannot run, or makes no sense, on a CPU.
    """

    name: str
    form: str
    memory_format: torch.memory_format = torch.contiguous_format
    compile_mode: str | None = None
    graphed: bool = False
    gpu_only: bool = False

    def competes(self, work: Work, device: torch.device) -> bool:
        """Whether this implementation takes part in a comparison."""
        if self.gpu_only and device.type != "cuda":
            return False
        if self.form == LIBRARY and work.direction != FORWARD:
            return False
        if self.memory_format == torch.channels_last and isinstance(work.case, LinearCase):
            return False
        if self.compile_mode is not None:
            # A mode with CUDA graphs overwrites a forward's output by the next forward, so backward alone has none.
            if work.direction == BACKWARD and self.compile_mode != "default":
                return False
            return work.compiled and (device.type == "cuda" or shutil.which("g++") is not None)
        # At kernel level everything is graphed already; graphs of single operators are what kernel level shows.
        return not self.graphed or (work.level != KERNEL and isinstance(work.case, LeNetCase))


_LAST = torch.channels_last
FASTLENET = Implementation("fastlenet", FUSED)
EAGER = Implementation("eager", STOCK)
IMPLEMENTATIONS = (
    FASTLENET,
    EAGER,
    Implementation("channels_last", STOCK, _LAST),
    Implementation("compiled", STOCK, compile_mode="default"),
    Implementation("compiled reduce-overhead", STOCK, compile_mode="reduce-overhead", gpu_only=True),
    Implementation("compiled max-autotune", STOCK, compile_mode="max-autotune", gpu_only=True),
    Implementation("fastlenet graphed", FUSED, graphed=True, gpu_only=True),
    Implementation("eager graphed", STOCK, graphed=True, gpu_only=True),
    Implementation("channels_last graphed", STOCK, _LAST, graphed=True, gpu_only=True),
    Implementation("library", LIBRARY, gpu_only=True),
    Implementation("library channels_last", LIBRARY, _LAST, gpu_only=True),
)


def competitors(work: Work, device: torch.device) -> list[Implementation]:
    """List the implementations of a comparison, fastlenet first."""
    return [implementation for implementation in IMPLEMENTATIONS if implementation.competes(work, device)]


@contextmanager
def precision_mode(precision: str) -> Iterator[None]:
    """Set PyTorch's fp32 precision switches for everybody, and put them back afterwards.

    The older switch of matrix products goes first and says the same: torch.compile's max-autotune reads it, and PyTorch
    refuses to answer where the two differ. It sets oneDNN's, too.
    """
    switches = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision("high" if before[1] == "tf32" else "highest")
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


class _Operator(nn.Module):
    """A single operator as a module with its parameters, the same shell around every form."""

    def __init__(self, work: Work, function: Callable[..., Tensor], *args: Any, **options: Any) -> None:
        super().__init__()
        for name, shape in work.case.parameter_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.function, self.args, self.options = function, args, options

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.bias, *self.args, **self.options)


def _stock_conv(input: Tensor, weight: Tensor, bias: Tensor, case: ConvCase) -> Tensor:
    conv = F.conv2d(input, weight, bias, case.stride, case.padding)
    return F.max_pool2d(F.relu(conv), case.pool, case.pool_stride, case.pool_padding)


def _library_conv(input: Tensor, weight: Tensor, bias: Tensor, case: ConvCase) -> Tensor:
    stride, padding = (case.stride, case.stride), (case.padding, case.padding)
    conv = torch.cudnn_convolution_relu(input, weight, bias, stride, padding, (1, 1), 1)
    return F.max_pool2d(conv, case.pool, case.pool_stride, case.pool_padding)


def _stock_linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def _library_linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, input, weight.t(), use_gelu=False)


class _LibraryLeNet(fastlenet.StockLeNet):
    """Stock LeNet made of the fused calls that PyTorch's libraries offer."""

    def forward(self, input: Tensor) -> Tensor:
        for layer, case in zip((self.conv1, self.conv2), LeNetCase.convolutions, strict=True):
            input = _library_conv(input, layer.weight, layer.bias, case)
        input = input.flatten(1)
        for layer in (self.fc1, self.fc2):
            input = _library_linear(input, layer.weight, layer.bias)
        return self.fc3(input)


def build(work: Work, form: str) -> nn.Module:
    """Make a work's model in one of its forms; parameters are loaded later."""
    case = work.case
    if isinstance(case, LeNetCase):
        return {FUSED: fastlenet.LeNet, STOCK: fastlenet.StockLeNet, LIBRARY: _LibraryLeNet}[form]()
    if isinstance(case, LinearCase):
        fused = fastlenet.functional.linear_relu
        return _Operator(work, {FUSED: fused, STOCK: _stock_linear, LIBRARY: _library_linear}[form])
    if form == FUSED:
        return _Operator(
            work,
            fastlenet.functional.conv2d_relu_max_pool2d,
            case.stride,
            case.padding,
            pool_size=case.pool,
            pool_stride=case.pool_stride,
            pool_padding=case.pool_padding,
        )
    return _Operator(work, {STOCK: _stock_conv, LIBRARY: _library_conv}[form], case)


class Call:
    """An implementation bound to a work and its data.

    A measurement calls `prepare` (untimed) and `run` (timed) with the number of a set; `results` then names what was
    computed. Everything happens in the grad mode that `needs_grad` tells.

    Args:
        work: what to compute.
        implementation: how.
        data: from what; copied, so that no implementation sees another's traces.
    """

    def __init__(self, work: Work, implementation: Implementation, data: Data) -> None:
        self.work, self.implementation = work, implementation
        self.needs_grad = work.direction != FORWARD
        own = data.to(next(iter(data.parameters.values())).dtype, implementation.memory_format)
        self.sets = own.sets
        for input, _ in self.sets:
            input.requires_grad_(work.input_grad)
        self.model = build(work, implementation.form)
        self.model.load_state_dict(own.parameters, assign=True)
        self.model.train(work.direction == TRAIN_STEP).requires_grad_(self.needs_grad)
        self.parameters = dict(self.model.named_parameters())
        self._start = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._forward = self._loss if work.direction == TRAIN_STEP else self.model.forward
        mode = implementation.compile_mode
        if mode is not None:
            self._forward = torch.compile(self._forward, mode=mode, dynamic=False)
        self._marks_steps = mode not in (None, "default")
        if work.direction == TRAIN_STEP:
            self._optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self._capturing = False
        # Captured graphs: how to replay each, and what it computes for each of its sets.
        self._graphs: list[tuple[Callable[[], None], dict[int, dict[str, Tensor]]]] = []

    def _loss(self, input: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(self.model.forward(input), labels, "cross-entropy")

    def prepare(self, number: int) -> Any:
        """Return what `run` takes: for a backward pass the forward's output and all that autograd kept."""
        if self._graphs:
            return self._graphs[number % len(self._graphs)][0]
        input, target = self.sets[number % len(self.sets)]
        if self.work.direction == BACKWARD:
            return self._forward(input), input, target
        return input, target

    def run(self, prepared: Any) -> Any:
        """Do the work; what it returns stays valid until the next call."""
        if self._graphs:
            return prepared()
        if self._marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        direction = self.work.direction
        if direction == FORWARD:
            return self._forward(prepared[0])
        if direction == BACKWARD:
            return self._gradients(*prepared)
        input, target = prepared
        if direction == BOTH:
            output = self._forward(input)
            return output, *self._gradients(output, input, target)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._forward(input, target)
        loss.backward()
        self._optimizer.step()
        return loss

    def _gradients(self, output: Tensor, input: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = ((input,) if self.work.input_grad else ()) + tuple(self.parameters.values())
        # A captured backward is replayed, so what it reads must stay.
        return torch.autograd.grad(output, leaves, upstream, retain_graph=self._capturing)

    def _named(self, output: Any) -> dict[str, Tensor]:
        """Name what `run` returned or left behind."""
        if self.work.direction == TRAIN_STEP:
            named = {"loss": output} | {f"gradient of {n}": p.grad for n, p in self.parameters.items()}
            return named | {f"{n} after the step": p for n, p in self.parameters.items()}
        values = output if isinstance(output, tuple) else (output,)
        gradients = (["input"] if self.work.input_grad else []) + list(self.parameters)
        names = [] if self.work.direction == BACKWARD else ["output"]
        return dict(zip(names + [f"gradient of {n}" for n in gradients], values, strict=False))

    def forward_only(self) -> Tensor:
        """Run the network forward on the first set; where the loss is compiled with it, the loss too."""
        input, target = self.sets[0]
        if self.implementation.compile_mode is None or self.work.direction != TRAIN_STEP:
            return self.model.forward(input) if self.implementation.compile_mode is None else self._forward(input)
        return self._forward(input, target)

    def results(self, number: int) -> dict[str, Tensor]:
        """Run on one set from the initial parameters and return copies of everything computed, by name."""
        if self._graphs:
            replay, computed = next(graph for graph in self._graphs if number in graph[1])
            replay()
            named = computed[number]
        else:
            with torch.set_grad_enabled(self.needs_grad):
                named = self._named(self.run(self.prepare(number)))
        copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in named.items()}
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self._start[name])
        return copies

    @property
    def is_graphed(self) -> bool:
        """Whether `run` replays a CUDA graph."""
        return bool(self._graphs)

    @property
    def calls_per_run(self) -> int:
        """How many calls one `run` holds."""
        return len(self._graphs[0][1]) if self._graphs else 1

    def capture(self, *, together: bool) -> None:
        """From now on replay CUDA graphs.

        Args:
            together: one graph of a call on every set, which shows what the GPU alone takes; otherwise a graph per set,
                as a user would capture a step, its data in place.
        """
        numbers = range(len(self.sets))
        self._capturing = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.set_grad_enabled(self.needs_grad):
            for number in range(3):  # libraries set themselves up, kernels compile
                self.run(self.prepare(number))
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        self._graphs = [self._captured(group, pool) for group in ([numbers] if together else [[n] for n in numbers])]

    def _captured(self, numbers: Sequence[int], pool: Any) -> tuple[Callable[[], None], dict[int, dict[str, Tensor]]]:
        before, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(self.needs_grad):
            if self.work.direction == BACKWARD:
                with torch.cuda.graph(before, pool=pool):
                    prepared = [self.prepare(number) for number in numbers]
                before.replay()
            else:
                prepared = [self.prepare(number) for number in numbers]
            with torch.cuda.graph(graph, pool=pool):
                computed = {n: self._named(self.run(p)) for n, p in zip(numbers, prepared, strict=True)}
        # The forward's graph, and all that its backward reads, live as long as the replay does.
        return partial(_replay, graph, before, prepared), computed


def _replay(graph: torch.cuda.CUDAGraph, *_kept: Any) -> None:
    graph.replay()


# Images of one float64 inference: a whole large batch would need gigabytes.
REFERENCE_IMAGES = 8192


def reference_results(work: Work, data: Data) -> list[Results]:
    """Compute what the results should be: stock eager in float64, from the very same values."""
    exact = data.to(torch.float64)
    if work.direction != FORWARD:
        call = Call(work, EAGER, exact)
        return [call.results(number) for number in range(parity_sets(work))]
    outputs = []
    for input, target in exact.sets[: parity_sets(work)]:
        parts = [Data(exact.parameters, [(part, target)]) for part in input.split(REFERENCE_IMAGES)]
        outputs.append({"output": torch.cat([Call(work, EAGER, part).results(0)["output"] for part in parts])})
    return outputs
