"""Fixtures for tests of whole models."""

from __future__ import annotations

import functools
import importlib
from collections import Counter

import pytest
import torch

from fastlenet import functional, selection

CONV, LINEAR = "conv2d_relu_max_pool2d", "linear_relu"


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Start each test with nothing captured."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _single_sites(request, monkeypatch):
    """Let no compiled CPU kernel run, so that sites stay single; tests of chains ask for kernels of their own."""
    if "cpu_kernels" not in request.fixturenames and "compiled" not in request.fixturenames:
        from fastlenet import cpu

        monkeypatch.setattr(cpu, "unavailable", lambda: "they are switched off")
    selection.forget()
    yield
    selection.forget()


@pytest.fixture
def compiled(monkeypatch):
    """The compiled CPU kernels themselves, however small a batch is."""
    pytest.importorskip("numba")
    monkeypatch.setattr(importlib.import_module("fastlenet.cpu.batch_norm_relu_max_pool2d"), "LITTLE", 0)
    selection.forget()


@pytest.fixture
def ran(monkeypatch):
    """Count fused calls: `ran(call)` runs it and returns how many (convolutions, linear maps) a fused operator did."""
    counted: Counter[str] = Counter()

    def counting(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for name in (CONV, LINEAR, "addmm_relu", "mlp"):
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))

    def run(call, *args, **kwargs):
        counted.clear()
        call(*args, **kwargs)
        return counted[CONV], counted[LINEAR] + counted["addmm_relu"]

    return run


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that the backend compiles, as code."""
    from fastlenet.fusion.backend import Backend

    seen = []
    compile_graph = Backend.__call__

    def spy(self, graph_module, example_inputs):
        compiled = compile_graph(self, graph_module, example_inputs)
        seen.append(graph_module.code)
        return compiled

    monkeypatch.setattr(Backend, "__call__", spy)
    return seen
