"""The compiled CPU kernels: rates of kernels against FMAs, layers and networks against stock, and ONNX Runtime.

    python -m bench.cpu_kernels                 # all parts
    python -m bench.cpu_kernels --part kernels  # GFLOP/s of each kernel and of plain FMAs, one thread, CPU time
    python -m bench.cpu_kernels --part networks --threads 2 --images 32,512

Ratios are medians over rounds in which all take turns. With one thread CPU time is measured, because other processes
disturb it least. With more threads it is wall-clock time. ONNX Runtime's threads spin, so it and the chain run in
separate processes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fastlenet.kernels.geometry import ConvPoolGeometry
from torch import Tensor, nn

import fastlenet
from fastlenet import cpu
from fastlenet.cpu import record
from fastlenet.cpu.compiled import address, register_vectors
from fastlenet.cpu.plan import gradients_of, plan_of, steps_of

Calls = dict[str, Callable[[], object]]

PLAIN = ConvPoolGeometry((1, 1), (0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)

# Channels, filters, size of the image, size of the kernel, padding. LeNet's two come first.
LAYERS = [
    (1, 6, 32, 5, 0),
    (6, 16, 14, 5, 0),
    (3, 6, 32, 5, 0),
    (1, 10, 28, 5, 0),
    (10, 20, 12, 5, 0),
    (1, 32, 28, 3, 0),
    (16, 32, 14, 3, 0),
    (32, 64, 13, 3, 0),
    (64, 64, 14, 3, 1),
]

# Image; filters, kernel size and padding of each convolution; widths of the linear layers.
NETWORKS = {
    "LeNet": ((1, 32, 32), [(6, 5, 0), (16, 5, 0)], (120, 84, 10)),
    "3-6-16 k5": ((3, 32, 32), [(6, 5, 0), (16, 5, 0)], (120, 84, 10)),
    "1-10-20 k5": ((1, 28, 28), [(10, 5, 0), (20, 5, 0)], (50, 10)),
    "1-32-64 k3": ((1, 28, 28), [(32, 3, 0), (64, 3, 0)], (128, 10)),
    "1-16-32 k3 p1": ((1, 28, 28), [(16, 3, 1), (32, 3, 1)], (10,)),
    "3-32-64-64 k3 p1": ((3, 32, 32), [(32, 3, 1), (64, 3, 1), (64, 3, 1)], (64, 10)),
    "1-32-64 k5 p2": ((1, 28, 28), [(32, 5, 2), (64, 5, 2)], (256, 10)),
}


def medians(calls: Calls, rounds: int, repeats: int) -> dict[str, float]:
    """Seconds a call, by name: medians over rounds in which all take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = clock()
            for _ in range(repeats):
                call()
            samples[name].append((clock() - begin) / repeats)
    return {name: statistics.median(values) for name, values in samples.items()}


# --- kernels -------------------------------------------------------------------------------------------------------


def fma_chains() -> tuple[Callable[[], None], float]:
    """Return a call of nothing but FMAs in registers, and its FLOP."""
    from fastlenet.cpu.lanes import add_products, kernel, load, splat, store, zeros

    rows, columns, turns = ((0,) * 4, (0,) * 5, 2000) if register_vectors() == 32 else ((0,), (0,) * 6, 2000)
    tile = len(rows) * len(columns)
    places = tuple(64 * i for i in range(tile))

    @kernel(2)
    def chains(source: int, target: int) -> None:
        sums = zeros(rows, columns)
        values, factors = load(source, rows), splat(source, columns)
        for _ in range(turns):
            sums = add_products(sums, values, factors)
        store(target, places, sums)

    source, target = torch.full((64,), 1e-3), torch.empty(tile * 16)
    return lambda: chains.ctypes(source.data_ptr(), target.data_ptr()), 2 * tile * 16 * turns


def kernels() -> None:
    """Print each kernel's rate on one block, in GFLOP/s of dense work, and as a part of the FMA rate seen beside it."""
    peak, peak_flop = fma_chains()
    print(f"{'layer':>20} {'FMA':>5} {'forward':>12} {'inference':>12} {'grad_weight':>12} {'grad_input':>12}")
    for channels, filters, size, kernel, padding in LAYERS:
        geometry = PLAIN._replace(padding=(padding, padding))
        plan = plan_of((channels, size, size), (filters, channels, kernel, kernel), geometry, False, False)
        table, tile = plan.record, plan.tile

        def floats(size: int) -> Tensor:
            return torch.randn(size // 4 + 64)

        source = floats(max(64 * channels * size**2, table[record.PAD_BYTES]))
        weights, target = floats(table[record.PACKED_BYTES]), floats(table[record.TARGET_BYTES])
        argmax = torch.randint(0, 5, (table[record.TARGET_BYTES] // 4 + 64,)).to(torch.uint8)
        argmax[argmax == 4] = 255
        conv = floats(table[record.CONV_BYTES])
        shape, pooled_shape = (channels, size, size), (filters, *plan.pooled_size)
        steps = steps_of(shape, 4 * channels * size**2)
        pooled_steps = steps_of(pooled_shape, table[record.TARGET_BYTES] // 16)
        argmax_steps = tuple(step // 4 for step in pooled_steps)
        gradients = gradients_of(
            shape, (filters, channels, kernel, kernel), geometry, steps, pooled_steps, argmax_steps, steps
        )
        grad, sums = torch.empty_like(source), torch.zeros(filters * channels * kernel**2 + filters)
        packed, scratch = torch.zeros(gradients.packed_bytes // 4), floats(gradients.scratch_bytes)
        pooled, chosen = torch.empty_like(target), torch.empty_like(argmax)
        at = [t.data_ptr() for t in (source, weights, pooled, chosen, conv)]

        def forward(argmax: int) -> Callable[[], object]:
            function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(
                address("convolution", "forward_block", tile.filters, tile.pixels, argmax)  # noqa: B023
            )
            return lambda: function(plan.address, *at)  # noqa: B023

        def backward(grad_at: int, *sums_at: int) -> Callable[[], object]:
            function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(address("gradients", "gradients"))
            places = [t.data_ptr() for t in (source, target, argmax, packed)]  # noqa: B023
            last = scratch.data_ptr()  # noqa: B023
            return lambda: function(gradients.address, 16, *places, grad_at, *sums_at, last)  # noqa: B023

        calls: Calls = {
            "forward": forward(1),
            "inference": forward(0),
            "grad_weight": backward(0, sums.data_ptr(), sums[-filters:].data_ptr()),
            "grad_input": backward(grad.data_ptr(), 0, 0),
        }
        pixels = (plan.pooled_size[0] * 2) * (plan.pooled_size[1] * 2)
        flop = 2 * 16 * filters * channels * kernel**2 * pixels
        cells, best = [], 0.0
        for call in calls.values():
            seconds = medians({"peak": peak, "kernel": call}, 25, 8)
            rate, fma = flop / seconds["kernel"] / 1e9, peak_flop / seconds["peak"] / 1e9
            best = max(best, fma)
            cells.append(f"{rate:>6.0f} {rate / fma:>4.0%} ")
        print(f"{channels:>3} to {filters:>3}, {size}, k{kernel} p{padding} {best:>5.0f}", *cells, flush=True)


# --- against stock -------------------------------------------------------------------------------------------------


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, geometry):
        output, argmax = cpu.conv2d_relu_max_pool2d(input, weight, bias, geometry, True)
        ctx.save_for_backward(input, weight, argmax)
        ctx.geometry = geometry
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, argmax = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *cpu.conv2d_relu_max_pool2d_backward(grad_output, input, weight, argmax, ctx.geometry, needed), None


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, links, *parameters):
        output, saved = cpu.chain(input, parameters, links, True)
        ctx.save_for_backward(input, *parameters, *saved)
        ctx.links, ctx.count = links, len(parameters)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, *rest = ctx.saved_tensors
        parameters, saved = rest[: ctx.count], rest[ctx.count :]
        mask = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]
        first, *others = cpu.chain_backward(grad_output, input, parameters, ctx.links, saved, mask)
        return first, None, *others


def _ratios(name: str, images: int, calls: dict[str, Calls]) -> None:
    repeats, cells = max(1, 64 // images), []
    for direction, trio in calls.items():
        seconds = medians(trio, 9, repeats)
        first, *others = seconds.values()
        cells.append(f"{direction} {first * 1e3:8.3f} ms " + " ".join(f"{other / first:5.2f}x" for other in others))
    print(f"{name:>20} {images:>5}  " + "   ".join(cells), flush=True)


def layers(images: list[int]) -> None:
    """Print each layer's time, and how many times as long stock takes in the plain layout and in channels_last."""
    for channels, filters, size, kernel, padding in LAYERS:
        geometry = PLAIN._replace(padding=(padding, padding))
        for count in images:
            inputs, parameters = [], []
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                input = torch.randn(count, channels, size, size).contiguous(memory_format=layout)
                weight = torch.randn(filters, channels, kernel, kernel).contiguous(memory_format=layout)
                # The first layer of a network needs no gradient of its input.
                inputs.append(input.requires_grad_(channels > 3))
                parameters.append((weight.requires_grad_(), torch.randn(filters, requires_grad=True)))

            def stock(i: int) -> Tensor:
                return F.max_pool2d(F.relu(F.conv2d(inputs[i], *parameters[i], padding=padding)), 2)  # noqa: B023

            def train(function: Callable[[], Tensor], i: int) -> object:
                leaves = [t for t in (inputs[i], *parameters[i]) if t.requires_grad]  # noqa: B023
                output = function()
                return torch.autograd.grad(output, leaves, output.detach())

            def infer(i: int) -> Tensor:
                with torch.no_grad():
                    return stock(i)

            plain = [t.detach() for t in (inputs[0], *parameters[0])]
            calls: dict[str, Calls] = {
                "train": {
                    "cpu": lambda: train(lambda: _Layer.apply(inputs[0], *parameters[0], geometry), 0),  # noqa: B023
                    "stock": lambda: train(lambda: stock(0), 0),
                    "channels_last": lambda: train(lambda: stock(1), 1),
                },
                "infer": {
                    "cpu": lambda: cpu.conv2d_relu_max_pool2d(*plain, geometry, False),  # noqa: B023
                    "stock": lambda: infer(0),
                    "channels_last": lambda: infer(1),
                },
            }
            _ratios(f"{channels} to {filters}, {size}, k{kernel}", count, calls)


def network(name: str) -> tuple[nn.Sequential, tuple[ConvPoolGeometry | str, ...], tuple[int, ...]]:
    """Build a network of `NETWORKS`: in stock modules, and its links."""
    shape, convolutions, widths = NETWORKS[name]
    modules: list[nn.Module] = []
    links: list[ConvPoolGeometry | str] = []
    channels = shape[0]
    for filters, kernel, padding in convolutions:
        modules += nn.Conv2d(channels, filters, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2)
        links.append(PLAIN._replace(padding=(padding, padding)))
        channels = filters
    modules.append(nn.Flatten())
    features = nn.Sequential(*modules)(torch.zeros(1, *shape)).shape[1]
    for number, width in enumerate(widths, 1):
        modules += nn.Linear(features, width), nn.ReLU()
        links.append("linear_relu" if number < len(widths) else "linear")
        features = width
    return nn.Sequential(*modules[:-1]), tuple(links), shape


def networks(images: list[int]) -> None:
    """Print each network's time as one chain, and how many times as long stock takes, plain and in channels_last."""
    for name in NETWORKS:
        model, links, shape = network(name)
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        parameters = list(model.parameters())
        plain = [parameter.detach() for parameter in parameters]
        for count in images:
            input, target = torch.randn(count, *shape), torch.randint(0, 10, (count,))
            last = input.contiguous(memory_format=torch.channels_last)

            def step(function: Callable[[], Tensor], model: nn.Module) -> None:
                model.zero_grad()
                F.cross_entropy(function(), target).backward()  # noqa: B023

            def infer(model: nn.Module, input: Tensor) -> Tensor:
                with torch.no_grad():
                    return model(input)

            calls: dict[str, Calls] = {
                "train": {
                    "cpu": lambda: step(lambda: _Chain.apply(input, links, *parameters), model),  # noqa: B023
                    "stock": lambda: step(lambda: model(input), model),  # noqa: B023
                    "channels_last": lambda: step(lambda: other(last), other),  # noqa: B023
                },
                "infer": {
                    "cpu": lambda: cpu.chain(input, plain, links, False),  # noqa: B023
                    "stock": lambda: infer(model, input),  # noqa: B023
                    "channels_last": lambda: infer(other, last),  # noqa: B023
                },
            }
            _ratios(name, count, calls)


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


def onnx_side(which: str, count: int, threads: int, folder: str) -> None:
    """Time LeNet's inference, the chain's or ONNX Runtime's, and print milliseconds."""
    torch.set_num_threads(threads)
    model, links, shape = network("LeNet")
    torch.manual_seed(0)
    input = torch.randn(count, *shape)
    if which == "cpu":
        parameters = [parameter.detach() for parameter in model.parameters()]
        calls: Calls = {which: lambda: cpu.chain(input, parameters, links, False)}
    else:
        import onnxruntime

        path = Path(folder) / f"{count}.onnx"
        if not path.exists():
            torch.onnx.export(model.eval(), (input,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: input.numpy()}
        calls = {which: lambda: session.run(None, feed)}
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        calls[which]()
    samples = []
    for _ in range(15):
        begin, work = time.perf_counter(), time.process_time()
        for _ in range(max(1, 256 // count)):
            calls[which]()
        # With one thread CPU time is measured, so that other processes do not count.
        took = time.process_time() - work if threads == 1 else time.perf_counter() - begin
        samples.append(took / max(1, 256 // count))
    print(statistics.median(samples) * 1e3)


def onnx(images: list[int], threads: int) -> None:
    """Print the chain's time for LeNet's inference and how many times as long ONNX Runtime takes, three turns each."""
    with tempfile.TemporaryDirectory() as folder:
        for count in images:
            found: dict[str, list[float]] = {"cpu": [], "onnx": []}
            for _ in range(3):
                for which, values in found.items():
                    arguments = "--side", which, "--images", str(count), "--threads", str(threads), "--folder", folder
                    command = [sys.executable, "-m", "bench.cpu_kernels", *arguments]
                    run = subprocess.run(command, check=True, capture_output=True, text=True)
                    values.append(float(run.stdout.split()[-1]))
            own, baseline = (statistics.median(values) for values in found.values())
            print(f"LeNet inference {count:>5}: {own:.3f} ms, ONNX Runtime {baseline / own:.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part = "the only part to run (default: all)"
    threads = "CPU threads of every implementation (default: 1)"
    images = "batch sizes of layers and networks, separated by commas (default: 1,32,64,512,1024)"
    counts = [1, 32, 64, 512, 1024]
    parser.add_argument("--part", choices=["kernels", "layers", "networks", "onnx"], help=part)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=threads)
    parser.add_argument(
        "--images", type=lambda text: [int(n) for n in text.split(",")], default=counts, metavar="N,N", help=images
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        onnx_side(options.side, options.images[0], options.threads, options.folder)
        return
    reason = cpu.unavailable()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(options.threads)
    print(f"fastlenet {fastlenet.__version__}, torch {torch.__version__}, {options.threads} threads")
    parts = {
        "kernels": kernels,
        "layers": lambda: layers(options.images),
        "networks": lambda: networks(options.images),
        "onnx": lambda: onnx(options.images, options.threads),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            part()


if __name__ == "__main__":
    main()
