"""The implementations: fastlenet and its baselines, each in its best form, bound to the same data.

An `Implementation` is a model in one of three forms (fused by fastlenet, stock, or stock's partly fused library calls),
a memory layout, and a way to run it: eagerly, compiled, or replayed from a CUDA graph. A `Call` binds one to a
comparison's data; calls are checked and timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlenet
from bench.workloads import (
    BACKWARD,
    BOTH,
    FORWARD,
    KERNEL,
    LENET,
    TRAIN_STEP,
    ConvCase,
    Data,
    LinearCase,
    NetworkCase,
    Results,
    Work,
    parity_sets,
)
from fastlenet.timing import synchronize
from fastlenet.training.loop import classification_loss

FUSED, STOCK, LIBRARY, ONNX = "fused", "stock", "library", "onnx"

REST_SECONDS = 0.01
"""Seconds that the threads of both libraries may spin after a run."""

# So small that the weights do not change: every step of every implementation does the same work.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Implementation:
    """One way to compute a work.

    Attributes:
        name: its name in the results.
        form: `FUSED` (fastlenet), `STOCK`, `LIBRARY` (``cudnn_convolution_relu`` + max-pool and
            ``_addmm_activation``, which have no derivative: forward only), or `ONNX` (ONNX Runtime, networks forward).
        memory_format: of four-dimensional parameters and data, which are converted before the clock starts.
        compile_mode: torch.compile's mode, or None.
        graphed: whether to replay a CUDA graph, captured for each set of data, instead of calling from Python.
        gpu_only: whether it cannot run, or makes no sense, on a CPU.
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
        network = isinstance(work.case, NetworkCase)
        if self.form == LIBRARY and (work.direction != FORWARD or (network and work.case is not LENET)):
            return False
        if self.form == ONNX:
            plain = network and work.direction == FORWARD and work.dtype == torch.float32
            return plain and device.type == "cpu" and importlib.util.find_spec("onnxruntime") is not None
        if self.memory_format == torch.channels_last and isinstance(work.case, LinearCase):
            return False
        if self.compile_mode is not None:
            # With CUDA graphs the next forward overwrites a forward's output, so backward alone is not measured.
            if work.direction == BACKWARD and self.compile_mode != "default":
                return False
            return work.compiled and (device.type == "cuda" or shutil.which("g++") is not None)
        # At kernel level everything is graphed already, graphs of single operators included.
        return not self.graphed or (work.level != KERNEL and isinstance(work.case, NetworkCase))


_LAST = torch.channels_last
FASTLENET = Implementation("fastlenet", FUSED)
EAGER = Implementation("eager", STOCK)
IMPLEMENTATIONS = (
    FASTLENET,
    EAGER,
    Implementation("channels_last", STOCK, _LAST),
    Implementation("compiled", STOCK, compile_mode="default"),
    Implementation("onnxruntime", ONNX),
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
    """Set PyTorch's fp32 precision switches for all implementations, and restore them afterwards.

    The older switch of matrix products is set first, to the same value: torch.compile's max-autotune reads it, and
    PyTorch raises an error if the two differ. It also sets oneDNN's.
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
    """A single operator as a module with its parameters, the same module for every form."""

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
    """Stock LeNet made of the fused calls of PyTorch's libraries."""

    def forward(self, input: Tensor) -> Tensor:
        for layer, case in zip((self.conv1, self.conv2), LENET.convolutions, strict=True):
            input = _library_conv(input, layer.weight, layer.bias, case)
        input = input.flatten(1)
        for layer in (self.fc1, self.fc2):
            input = _library_linear(input, layer.weight, layer.bias)
        return self.fc3(input)


class _Network(nn.Module):
    """A network in plain torch.nn, described by a `NetworkCase`."""

    def __init__(self, case: NetworkCase) -> None:
        super().__init__()
        self.case = case
        for i, conv in enumerate(case.convolutions, start=1):
            layer = nn.Conv2d(conv.channels, conv.out_channels, conv.kernel, conv.stride, conv.padding)
            self.add_module(f"conv{i}", layer)
            if case.norm:
                self.add_module(f"norm{i}", nn.BatchNorm2d(conv.out_channels))
        for i, sizes in enumerate(pairwise(case.widths), start=1):
            self.add_module(f"fc{i}", nn.Linear(*sizes))

    def forward(self, input: Tensor) -> Tensor:
        for i, conv in enumerate(self.case.convolutions, start=1):
            input = self.get_submodule(f"conv{i}")(input)
            if self.case.norm:
                input = self.get_submodule(f"norm{i}")(input)
            input = F.max_pool2d(F.relu(input), conv.pool, conv.pool_stride, conv.pool_padding)
        input = input.flatten(1)
        last = len(self.case.widths) - 1
        for i in range(1, last):
            input = F.relu(self.get_submodule(f"fc{i}")(input))
        return self.get_submodule(f"fc{last}")(input)


def build(work: Work, form: str) -> nn.Module:
    """Make a work's model in one of its forms; parameters are loaded later."""
    case = work.case
    if isinstance(case, NetworkCase) and case is not LENET:
        return _Network(case)
    if isinstance(case, NetworkCase):
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


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a function takes. On a GPU CUDA events around it measure, so launching counts if it is slower."""
    synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Call:
    """An implementation bound to a work and its data.

    A measurement calls `prepare` (untimed) and `run` (timed) with the number of a set. `results` then names the
    results. All run in the grad mode that `needs_grad` says.

    Args:
        work: the work to compute.
        implementation: the way to compute it.
        data: the data, which is copied, so that no implementation sees changes by another.
    """

    def __init__(self, work: Work, implementation: Implementation, data: Data) -> None:
        self.work, self.implementation = work, implementation
        self.needs_grad = work.direction != FORWARD
        own = data.to(next(iter(data.parameters.values())).dtype, implementation.memory_format)
        self.sets = own.sets
        for input, _ in self.sets:
            input.requires_grad_(work.input_grad)
        self.model = build(work, implementation.form).to(next(iter(own.parameters.values())))
        # A BatchNorm starts from its own statistics, because Data has only parameters.
        self.model.load_state_dict(own.parameters, assign=True, strict=not getattr(work.case, "norm", False))
        self.model.train(work.direction == TRAIN_STEP).requires_grad_(self.needs_grad)
        if implementation.form == FUSED and isinstance(work.case, NetworkCase) and work.case is not LENET:
            fastlenet.fuse(self.model, self.sets[0][0], inplace=True)
        self.parameters = dict(self.model.named_parameters())
        self._start = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._forward = self._loss if work.direction == TRAIN_STEP else self.model
        mode = implementation.compile_mode
        if mode is not None:
            self._forward = torch.compile(self._forward, mode=mode, dynamic=False)
        self._marks_steps = mode not in (None, "default")
        if work.direction == TRAIN_STEP:
            self._optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self._capturing = False
        # Captured graphs: how to replay each, and its results for each of its sets.
        self._graphs: list[tuple[Callable[[], None], dict[int, dict[str, Tensor]]]] = []

    def _loss(self, input: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(self.model(input), labels, "cross-entropy")

    def prepare(self, number: int) -> Any:
        """Return the argument of `run`: for a backward pass the forward's output with all that autograd keeps."""
        if self._graphs:
            return self._graphs[number % len(self._graphs)][0]
        input, target = self.sets[number % len(self.sets)]
        if self.work.direction == BACKWARD:
            return self._forward(input), input, target
        return input, target

    def run(self, prepared: Any) -> Any:
        """Do the work. The result stays valid until the next call."""
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
        # A captured backward is replayed, so its inputs must stay.
        return torch.autograd.grad(output, leaves, upstream, retain_graph=self._capturing)

    def _named(self, output: Any) -> dict[str, Tensor]:
        """Return the results of `run` by name."""
        if self.work.direction == TRAIN_STEP:
            named = {"loss": output} | {f"gradient of {n}": p.grad for n, p in self.parameters.items()}
            return named | {f"{n} after the step": p for n, p in self.parameters.items()}
        values = output if isinstance(output, tuple) else (output,)
        gradients = (["input"] if self.work.input_grad else []) + list(self.parameters)
        names = [] if self.work.direction == BACKWARD else ["output"]
        return dict(zip(names + [f"gradient of {n}" for n in gradients], values, strict=False))

    def forward_only(self) -> Tensor:
        """Run the network forward on the first set, and the loss if it is compiled with it."""
        input, target = self.sets[0]
        if self.implementation.compile_mode is None or self.work.direction != TRAIN_STEP:
            return self.model(input) if self.implementation.compile_mode is None else self._forward(input)
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

    def seconds(self, repeats: int, first: int, device: torch.device) -> float:
        """Time `repeats` runs back to back, the first on set `first`, and return seconds per call.

        Preparations come before.
        """

        def work() -> None:
            while prepared:  # each run frees its preparation
                self.run(prepared.pop())

        with torch.set_grad_enabled(self.needs_grad):
            prepared = [self.prepare(first + number) for number in range(repeats)]
            prepared.reverse()
            return elapsed(work, device) / repeats / self.calls_per_run

    @property
    def is_graphed(self) -> bool:
        """Whether `run` replays a CUDA graph."""
        return bool(self._graphs)

    @property
    def calls_per_run(self) -> int:
        """How many calls one `run` holds."""
        return len(self._graphs[0][1]) if self._graphs else 1

    def capture(self, *, together: bool) -> None:
        """Replay CUDA graphs from now on.

        Args:
            together: whether to make one graph with a call on every set, which shows the GPU's time alone. Otherwise
                there is a graph for each set, as a user would capture a step.
        """
        numbers = range(len(self.sets))
        self._capturing = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.set_grad_enabled(self.needs_grad):
            for number in range(3):  # libraries initialise, kernels compile
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
        # The replay keeps the forward's graph alive, and all that its backward reads.
        return partial(_replay, graph, before, prepared), computed


class OnnxCall:
    """ONNX Runtime bound to a network and its data: a `Call` for the forward pass, in its own process.

    Its threads spin after each run, as PyTorch's do. In one process they would take cores from each other.
    """

    needs_grad, is_graphed, calls_per_run = False, False, 1

    def __init__(self, work: Work, implementation: Implementation, data: Data) -> None:
        self.work, self.implementation = work, implementation
        self.parameters = data.parameters
        self._folder = tempfile.TemporaryDirectory(prefix="fastlenet-onnx-")
        folder = Path(self._folder.name)
        model = build(work, STOCK)
        model.load_state_dict(data.parameters, assign=True, strict=not getattr(work.case, "norm", False))
        example = data.sets[0][0]
        # torch.export reads an old switch, which PyTorch allows under this precision only. Nothing is computed here.
        with contextlib.redirect_stdout(io.StringIO()), precision_mode("tf32"):
            torch.onnx.export(model.eval(), (example,), str(folder / "model.onnx"), dynamo=True, verbose=False)
        for number, (input, _) in enumerate(data.sets):
            np.save(folder / f"input{number}.npy", input.numpy())
        command = [sys.executable, "-m", "bench.onnx_worker", str(folder), str(len(data.sets))]
        command.append(str(torch.get_num_threads()))
        root = Path(__file__).resolve().parent.parent
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True)
        weakref.finalize(self, _end, self._process)
        self._ask("ready")

    def _ask(self, *words: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"ONNX Runtime's process ended with code {self._process.wait()}")
        return answer

    def results(self, number: int) -> Results:
        """Run on one set and return the output."""
        self._ask("output", number)
        return {"output": torch.from_numpy(np.load(Path(self._folder.name) / "output.npy"))}

    def seconds(self, repeats: int, first: int, device: torch.device) -> float:
        """Time `repeats` runs back to back, after this process's threads have stopped spinning."""
        time.sleep(REST_SECONDS)
        seconds = float(self._ask("time", repeats, first))
        time.sleep(REST_SECONDS)
        return seconds


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


AnyCall = Call | OnnxCall


def bound(work: Work, implementation: Implementation, data: Data) -> AnyCall:
    """Bind an implementation to a comparison's data."""
    return (OnnxCall if implementation.form == ONNX else Call)(work, implementation, data)


def _replay(graph: torch.cuda.CUDAGraph, *_kept: Any) -> None:
    graph.replay()


# Images of one float64 inference. A whole large batch would need gigabytes.
REFERENCE_IMAGES = 8192


def reference_results(work: Work, data: Data) -> list[Results]:
    """Compute the reference results: stock eager in float64, from the same values."""
    exact = data.to(torch.float64)
    if work.direction != FORWARD:
        call = Call(work, EAGER, exact)
        return [call.results(number) for number in range(parity_sets(work))]
    outputs = []
    for input, target in exact.sets[: parity_sets(work)]:
        parts = [Data(exact.parameters, [(part, target)]) for part in input.split(REFERENCE_IMAGES)]
        outputs.append({"output": torch.cat([Call(work, EAGER, part).results(0)["output"] for part in parts])})
    return outputs
