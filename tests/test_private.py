"""PyTorch's private names stand in one file, and the package does without any of them."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastlenet import private

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "fastlenet" / "private.py"


def private_names(source: str) -> Iterator[str]:
    """The private names of PyTorch that a module reads by an import or as an attribute, from whatever it imported."""
    tree = ast.parse(source)
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                origin[alias.asname or first] = alias.name if alias.asname else first
                yield from _if_private(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                origin[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _if_private(f"{node.module}.{alias.name}")

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return origin.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from _if_private(dotted(node))


def _if_private(name: str) -> Iterator[str]:
    first, *parts = name.split(".")
    if first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts):
        yield name


def test_private_names_stand_in_one_file():
    for path in [*(ROOT / "fastlenet").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if path != FILE:
            assert list(private_names(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._x()", ["torch._C._x", "torch._C"]),
        ("import torch.nn as n\nn.modules._y", ["torch.nn.modules._y"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.utils._pytree import tree_map", ["torch.utils._pytree.tree_map"]),
        ("def f():\n    from torch import compiler\n    compiler._flag = 1", ["torch.compiler._flag"]),
        ("import torch\ntorch.__version__, self._x, torch.nn.Module", []),
        ("import numpy as torch\ntorch._x", []),
    ],
)
def test_the_reader_finds_them(source, found):
    assert list(private_names(source)) == found


@pytest.mark.wide
def test_this_pytorch_has_them_all():
    code = (
        "import torch, fastlenet; from fastlenet import private; fused = fastlenet.fuse(fastlenet.StockLeNet())\n"
        "fused(torch.ones(64, 1, 32, 32)); private.backend_named('eager')\n"
        "with private.not_compiling(): pass\n"
        "print(private.missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


LOOK_UP = "return attrgetter(name)(importlib.import_module(module))"
WITHOUT = FILE.read_text(encoding="utf-8").replace(LOOK_UP, "raise AttributeError(name)")
"""The module's source as a PyTorch runs it that has none of the names."""


@pytest.fixture
def without():
    module = types.ModuleType("without")
    exec(compile(WITHOUT, "without", "exec"), vars(module))
    return module


def asked_while(trace, question):
    """What a question answers while a function is traced."""
    answers = []

    def traced(x):
        answers.append(question())
        return x + 1

    trace(traced, torch.ones(1))
    return answers[0]


def test_stand_ins_give_the_same_answers(without):
    assert len(without.missing) >= 20
    for op in (("cuda", "conv"), ("cuda", "matmul")):
        assert without.fp32_precision(*op) == private.fp32_precision(*op)
    for module in (private, without):
        assert not module.any_autocast()
        with torch.autocast("cpu"):
            assert module.any_autocast()
        assert module.tracing_state() is None
        assert asked_while(lambda f, x: torch.jit.trace(f, x), module.tracing_state) is not None
        assert not module.proxied()
        assert asked_while(lambda f, x: make_fx(f)(x), module.proxied) is True
        with torch.autograd.forward_ad.dual_level():
            assert module.forward_mode()
        tree = {"a": [torch.ones(2), (1, torch.zeros(3))], "b": 2}
        leaves = module.tree_leaves(tree)
        assert [getattr(leaf, "shape", leaf) for leaf in leaves] == [(2,), 1, (3,), 2]
        assert module.tree_map(type, tree) == {"a": [torch.Tensor, (int, torch.Tensor)], "b": int}
        assert isinstance(torch.ops.aten.add.Tensor, module.OpOverload)
        assert isinstance(torch.ops.aten.add, module.OpOverloadPacket)
        graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
        assert torch.equal(module.backend_named("eager")(graph, [])(torch.ones(1, 2)), graph(torch.ones(1, 2)))


def test_stand_ins_without_a_public_way_are_careful(without):
    """They answer that something is at work, so that stock PyTorch runs."""
    assert without.transforms_active()
    assert without.is_batched(torch.ones(1))
    assert without.has_global_hook()
    assert without.intercepted()
    assert without.dispatch_modes() > 0
    assert isinstance(torch.ops.aten.add.Tensor, without.HigherOrderOperator)
    assert not private.transforms_active()
    assert not private.intercepted()
    with torch.device("meta"):
        assert not private.intercepted()


@pytest.mark.wide
def test_the_package_is_right_without_them_and_says_so():
    """Training steps, `fuse`, a compiled model, an exported one and a recorded step."""
    code = """
import sys, types, warnings
private = types.ModuleType("fastlenet.private")
exec(sys.argv[1], vars(private))
sys.modules["fastlenet.private"] = private
import torch, torch.nn.functional as F
torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastlenet
[text] = [str(warning.message) for warning in caught if "fastlenet" in str(warning.message)]
assert "it lacks torch._C._get_fp32_precision_getter, " in text, text
fused, stock = fastlenet.LeNet(), fastlenet.StockLeNet()
stock.load_state_dict(fused.state_dict())
images, labels = torch.randn(64, 1, 32, 32), torch.randint(10, (64,))
others = [fastlenet.fuse(fastlenet.StockLeNet()), torch.compile(fastlenet.StockLeNet(), backend="fastlenet")]
for model in (fused, *others):
    with torch.no_grad():
        for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
            mine.copy_(other)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    stock.zero_grad()
    F.cross_entropy(stock(images), labels).backward()
    for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(model(images), stock(images))
optimizer = torch.optim.SGD(fused.parameters(), 0.1)
step = fastlenet.graphs.GraphedTrainStep(fused, F.cross_entropy, optimizer, (images, labels))
assert step(images, labels) == F.cross_entropy(stock(images), labels)
program = torch.export.export(fused, (images,)).run_decompositions(fastlenet.decompositions())
torch.testing.assert_close(program.module()(images), fused(images))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, WITHOUT], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("version", "warned"), [("2.11.0", False), ("{}.{}.1+cpu", False), ("99.0.0a0", True)])
def test_a_newer_pytorch_gets_one_warning(monkeypatch, version, warned):
    monkeypatch.setattr(torch, "__version__", version.format(*private.NEWEST_TESTED))
    monkeypatch.setattr(private, "missing", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        private.warn_if_untested()
    newest = ".".join(map(str, private.NEWEST_TESTED))
    expected = [f"fastlenet is tested up to PyTorch {newest}, this is {torch.__version__}"] if warned else []
    assert [str(warning.message) for warning in caught] == expected
