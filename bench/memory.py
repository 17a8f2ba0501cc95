"""Memory: the bytes that autograd keeps for the backward pass, and the peak of a training step.

On a GPU the allocator reports the peak. On a CPU it is the resident memory of a separate process (``python -m
bench.memory``), which includes allocations that libraries make without PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.baselines import IMPLEMENTATIONS, AnyCall, Call, Implementation
from bench.workloads import LENET, TRAIN_STEP, Work, setup

ROOT = Path(__file__).resolve().parent.parent


def saved_bytes_per_image(call: AnyCall) -> float | None:
    """Bytes of the tensors that the forward pass saves with autograd for the backward pass.

    Each storage counts once and whole, for any number of views. Parameters do not count, the input does. The loss is
    left out, unless it is compiled together with the network. None if CUDA graphs hide the tensors.
    """
    if not call.needs_grad or call.implementation.compile_mode not in (None, "default") or call.is_graphed:
        return None
    parameters = {value.untyped_storage().data_ptr() for value in call.parameters.values()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The name keeps the graph alive, so that no address is given out twice while it is built.
        _output = call.forward_only()
    return sum(kept.values()) / call.work.batch


def gpu_peak_bytes(call: AnyCall) -> int | None:
    """Bytes that one call adds at its peak; None if a graph has its own pool."""
    if call.is_graphed or call.implementation.compile_mode not in (None, "default"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(call.needs_grad):
        call.run(call.prepare(0))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(work: Work, implementation: Implementation, timeout: float = 300) -> int | None:
    """Measure one training step of LeNet in a separate process; None if that is impossible.

    Returns:
        The bytes by which resident memory rises in a step, in a process that has trained before, with its data and
        parameters in place.
    """
    arguments = {"batch": work.batch, "dtype": str(work.dtype).removeprefix("torch."), "precision": work.precision}
    arguments |= {"implementation": implementation.name, "threads": torch.get_num_threads()}
    # Every larger tensor has its own mapping, which returns to the system when the tensor is freed.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    command = [sys.executable, "-m", "bench.memory", json.dumps(arguments)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _main(arguments: dict[str, Any]) -> int | None:
    torch.set_num_threads(arguments["threads"])
    implementation = next(i for i in IMPLEMENTATIONS if i.name == arguments["implementation"])
    dtype = getattr(torch, arguments["dtype"])
    work = Work(LENET, arguments["batch"], dtype, arguments["precision"], TRAIN_STEP, compiled=True)
    call = Call(work, implementation, setup(work, torch.device("cpu"), cache_bytes=0, choose=False))
    for number in (0, 1):  # one-time allocations happen here
        call.run(call.prepare(number))
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        return None
    call.run(call.prepare(0))
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the resident memory now, VmHWM its peak."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    description = "Measure the peak memory of a training step of LeNet. 'fastlenet bench' runs this by itself."
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=description)
    about = "an object of batch, dtype, precision, implementation and threads"
    parser.add_argument("work", type=json.loads, metavar="JSON", help=about)
    print(json.dumps(_main(parser.parse_args().work)))
