"""Kernels on PyTorch's own threads.

PyTorch's pool is OpenMP's, in most builds GNU's. ``GOMP_parallel`` runs a C function on that very pool, so that no
second pool competes with its workers, which wait for work by spinning. Where PyTorch has another pool, kernels run on
the caller's thread alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from typing import Any

import torch

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@functools.cache
def _gomp_parallel() -> Any:
    """GNU OpenMP's entry, of the library that this process has loaded; None where there is none."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:
        return None
    # Two copies of the library are two pools; PyTorch's wheels bring theirs along.
    own = {file for file in files if file.startswith(os.path.dirname(torch.__file__))}
    files = own or files
    if len(files) != 1:
        return None
    try:
        entry = ctypes.CDLL(files.pop()).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


@functools.cache
def _function(address: int) -> Any:
    return _WORKER(address)


def workers(tasks: int) -> int:
    """How many threads share so many tasks."""
    if tasks <= 1 or _gomp_parallel() is None:
        return 1
    return min(tasks, torch.get_num_threads())


def run(address: int, arguments: array[int], threads: int) -> None:
    """Call ``kernel(arguments)`` once on each of so many threads and wait for all.

    Workers share the tasks by a counter among the arguments. Python's lock is released meanwhile.
    """
    place, _ = arguments.buffer_info()
    if threads == 1:
        _function(address)(place)
        return
    entry = _gomp_parallel()
    assert entry is not None
    entry(address, place, threads, 0)


def fill(images: int, lanes: int) -> float:
    """The part of all threads' lanes that so many images keep busy.

    Blocks of 16 images are shared by whole blocks, while stock's operators divide single images among threads.
    """
    blocks, threads = -(-images // lanes), max(1, torch.get_num_threads())
    return images / (lanes * threads * max(1, -(-blocks // threads)))
