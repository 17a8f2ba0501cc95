"""The layout for Hugging Face's ``kernels``, loaded by the real package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own, away from the checkout, whose folder `kernels` would hide the package of that name.
LOAD = """
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernels

repository = Path(sys.argv[1])
if sys.argv[2] == "alone":
    sys.modules["fastlenet"] = None  # an absolute import in the copy fails
copy = kernels.get_local_kernel(repository, backend="cpu")
assert kernels.get_local_kernel(repository, backend="cpu") is copy
assert copy.__name__.startswith("_fastlenet_cpu_")
assert copy.ops.NAMESPACE == copy.__name__
"""
OPERATORS = """
images, weight, bias = torch.randn(2, 3, 12, 12), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)
actual = copy.functional.conv2d_relu_max_pool2d(images, weight, bias, pool_size=2)
expected = F.max_pool2d(F.relu(F.conv2d(images, weight, bias)), 2)
torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
grads = [torch.autograd.grad(output.sum(), weight)[0] for output in (actual, expected)]
torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
used = torch.export.export(copy.ConvReLUMaxPool2d(3, 4, 3), (images,)).graph
assert any(getattr(node.target, "namespace", None) == copy.ops.NAMESPACE for node in used.nodes)
rows = torch.randn(2, 3)
stock = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
torch.testing.assert_close(copy.fuse(stock)(rows), stock(rows))
"""
BESIDE = """
import fastlenet

assert fastlenet.ops.NAMESPACE == "fastlenet"
assert fastlenet.functional is not copy.functional
layer, twin = fastlenet.LinearReLU(3, 4), copy.LinearReLU(3, 4)
twin.load_state_dict(layer.state_dict())
rows = torch.randn(5, 3)
assert torch.equal(layer(rows), twin(rows))
"""
KERNELIZE = """
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping


@use_kernel_forward_from_hub("LinearReLU")
class Hidden(nn.Linear):
    def forward(self, input):
        return F.relu(super().forward(input))


@use_kernel_forward_from_hub("ConvReLUMaxPool2d")
class Stage(nn.Conv2d):
    pool_size, pool_stride, pool_padding, pool_dilation, ceil_mode = 3, 2, 1, 1, True

    def forward(self, input):
        return F.max_pool2d(F.relu(super().forward(input)), 3, 2, 1, ceil_mode=True)


torch.manual_seed(0)
model = nn.Sequential(Stage(1, 4, 3), nn.Flatten(), Hidden(4 * 6 * 6, 8), nn.Linear(8, 2))
images = torch.randn(3, 1, 12, 12)
expected = model(images)
parameters = list(model.parameters())
stock = torch.autograd.grad(expected.square().sum(), parameters)
names = ("ConvReLUMaxPool2d", "LinearReLU")
mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in names}
with use_kernel_mapping(mapping, inherit_mapping=False):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
output = model(images)
torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
for mine, theirs in zip(torch.autograd.grad(output.square().sum(), parameters), stock, strict=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
graph = make_fx(lambda images: model(images))(images).graph
used = {node.target._opname for node in graph.nodes if getattr(node.target, "namespace", None) == copy.ops.NAMESPACE}
assert used == {"conv2d_relu_max_pool2d", "addmm_relu"}, used
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    done = subprocess.run(
        [sys.executable, str(ROOT / "hub" / "build.py"), str(folder)], check=True, capture_output=True, text=True
    )
    variants = [folder / "build" / f"torch-{backend}" for backend in ("cpu", "cuda", "rocm")]
    assert [Path(line) for line in done.stdout.splitlines()] == variants
    return folder


def run(repository, tmp_path, *parts, beside="alone", load=LOAD):
    if not any(name.lower() == "kernels" for name in importlib.metadata.packages_distributions().get("kernels", ())):
        pytest.skip("Hugging Face's kernels is not installed (pip install 'fastlenet[dev]')")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # it may name the checkout
    script = tmp_path / "script.py"
    script.write_text("".join((load, *parts)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(repository), beside],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.wide
def test_loaded_alone(repository, tmp_path):
    """The copy imports nothing of an installed fastlenet, and its operators are its own."""
    run(repository, tmp_path, OPERATORS)


@pytest.mark.wide
def test_loaded_beside_an_installed_fastlenet(repository, tmp_path):
    run(repository, tmp_path, BESIDE, beside="beside")


@pytest.mark.wide
def test_kernelize_exchanges_the_forward_of_a_stock_like_model(repository, tmp_path):
    run(repository, tmp_path, KERNELIZE)


@pytest.mark.wide
def test_the_guide_does_what_it_says(repository, tmp_path):
    """Its Python blocks, as they stand; the exchanged layer then runs the copy's operator."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "out").mkdir()
    (tmp_path / "checkout" / "out" / "hub").symlink_to(repository)
    text = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    check = (
        "assert hidden.shape == (5, 4)\n"
        "graph = torch.export.export(model, (torch.randn(5, 3),)).graph\n"
        "spaces = {getattr(node.target, 'namespace', None) for node in graph.nodes}\n"
        "assert fastlenet.ops.NAMESPACE in spaces, graph\n"
    )
    run(repository, tmp_path, *blocks, check, load="")


def test_every_variant_is_the_same_code_under_its_own_name(repository):
    variants = sorted((repository / "build").iterdir())
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in variants
    ]
    metadata = [json.loads(some.pop("metadata.json")) for some in files]
    assert files[0] == files[1] == files[2]
    assert len({some["id"] for some in metadata}) == 3
    assert [some["backend"]["type"] for some in metadata] == [folder.name.removeprefix("torch-") for folder in variants]
    for name, content in files[0].items():
        if name.endswith(".py"):
            code = re.sub(r"^\s*(>>>|\.\.\.).*$", "", content.decode(), flags=re.MULTILINE)
            assert not re.search(r"^\s*(from|import) fastlenet", code, re.MULTILINE), name
            assert not re.search(r"[\"']fastlenet::|torch\.ops\.fastlenet\.[a-z]", code), name


def _hub_build():
    """``hub/build.py``, by its path: an installed package has the same name."""
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "hub" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_content_has_another_name(repository, monkeypatch, tmp_path):
    """Two versions may be loaded into one process: their operators do not meet."""
    build = _hub_build()
    files = build.collect()
    monkeypatch.setattr(build, "collect", lambda: {**files, "_version.py": b'__version__ = "9"\n'})
    build.build(tmp_path)
    names = [json.loads((f / "build/torch-cpu/metadata.json").read_text())["id"] for f in (repository, tmp_path)]
    assert names[0] != names[1]


def test_an_import_without_a_relative_form_is_refused():
    build = _hub_build()
    with pytest.raises(ValueError, match="line 2: write 'from fastlenet import"):
        build.relative("import torch\nimport fastlenet.ops\n", "fastlenet")
    text = "from fastlenet.kernels.geometry import Pair\nfrom fastlenet import ops, aten\nimport torch\n"
    assert build.relative(text, "fastlenet.kernels") == (
        "from ..kernels.geometry import Pair\nfrom .. import ops, aten\nimport torch\n"
    )
