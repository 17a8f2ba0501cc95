"""Several real processes, started by torchrun over gloo: the run that they make together is that of one process."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("safetensors")

from networks import TutorialNet
from runs import quick, write_idx

import fastlenet
from fastlenet import errors
from fastlenet.training import checkpoint, distributed, loop

HERE = Path(__file__).parent
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or importlib.util.find_spec("torch.distributed.run") is None,
    reason="this PyTorch is built without torch.distributed",
)

# Those that look at what one run of several processes left, which takes long.
together = pytest.mark.xdist_group("distributed")


def torchrun(*command: object, processes: int = 3, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program in processes of one thread each: in three, because two terms have the same sum in any order.

    They see no GPU unless asked to: a machine may have fewer than processes, and PyTorch's defaults take what is there.
    """
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [*line, *map(str, command)], capture_output=True, text=True, check=False, env=environment, timeout=500
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_idx(folder / "digits")
    return folder


@pytest.fixture(scope="module")
def worked(folder: Path) -> Path:
    """What the processes of `distributed_worker.py` left, of which the last was killed in the end."""
    done = torchrun(HERE / "distributed_worker.py", folder)
    assert f"exitcode  : -{signal.SIGKILL.value}" in done.stderr, done.stderr
    assert done.returncode != 0
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> loop.TrainResult:
    """The same run in one process."""
    return loop.train(quick(folder / "digits", epochs=3), output=folder / "alone")


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_make_up_the_batches_of_one_process(size: int) -> None:
    images, labels = torch.randn(23, 1, 8, 8), torch.arange(23)
    options = {"batch_size": 7, "seed": 1, "max_shift": 2}
    whole = list(loop.Batches(images, labels, **options).epoch(3))
    worlds = [distributed.World(rank, size) for rank in range(size)]
    parts = [loop.Batches(images, labels, **options, world=world) for world in worlds]
    for together, *shares in zip(whole, *(part.epoch(3) for part in parts), strict=True):
        for k in (0, 1):
            assert torch.equal(torch.cat([share[k] for share in shares]), together[k])
        counts = [len(share[1]) for share in shares]
        assert max(counts) - min(counts) <= 1
        # The mean over all images is the mean over the processes of their own means, so weighted.
        means = [share[1].double().mean().item() if count else 0.0 for share, count in zip(shares, counts, strict=True)]
        weighted = sum(mean * share[2] for mean, share in zip(means, shares, strict=True)) / size
        assert weighted == pytest.approx(together[1].double().mean().item(), rel=1e-14)
        assert [share[2] == 0 for share in shares] == [count == 0 for count in counts]


def test_one_process_weighs_nothing() -> None:
    """So that its run is, to the bit, what it was before there were several."""
    batches = loop.Batches(torch.randn(23, 1, 8, 8), torch.arange(23), batch_size=7, seed=1)
    assert [weight for _, _, weight in batches.epoch(0)] == [1.0] * 4


def test_generators_are_kept_by_rank() -> None:
    stored = {name: torch.Generator().manual_seed(seed).get_state() for name, seed in (("cpu", 1), ("cpu.1", 2))}
    with torch.random.fork_rng():
        for rank, expected in ((0, 1), (1, 2), (5, 9)):
            torch.manual_seed(9)
            # Of a process that was not there, nothing changes.
            checkpoint.set_rng_states(stored, distributed.World(rank, 6))
            assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(expected)))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A process that torchrun started, with four GPUs that PyTorch counts only; lists what PyTorch is told."""
    told: list[object] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    for function, value in (("is_torchelastic_launched", True), ("get_rank", 0), ("get_world_size", 1)):
        monkeypatch.setattr(torch.distributed, function, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "init_process_group", told.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return told


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_gpus_are_given_out_by_number(name: str, launched: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with distributed.join(torch.device(name)) as world:
        assert world.device == torch.device("cuda", 1)
    assert launched == [torch.device("cuda", 1), "nccl"]


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda:0", 2, "choose device 'cuda' instead of 'cuda:0'"),
        ("cuda", 1, "process 1 of this machine has no GPU, there are 1"),
    ],
)
def test_processes_without_a_gpu_each_are_refused(
    name: str, gpus: int, message: str, launched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(errors.InputError, match=message), distributed.join(torch.device(name)):
        pass
    assert launched == []


@pytest.mark.parametrize(("name", "number"), [("cuda", 3), ("cuda:1", 1)])
def test_one_process_under_torchrun_takes_the_current_gpu(name: str, number: int, launched: list[object]) -> None:
    """Or the GPU that was chosen. PyTorch is told its number, which it demands."""
    with distributed.join(torch.device(name)) as world:
        assert world.device == torch.device("cuda", number)
    assert launched == [torch.device("cuda", number), "nccl"]


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@together
@pytest.mark.parametrize("name", ["ddp of 5", "ddp of 1", "fsdp", "fsdp, stepped"])
def test_gradients_are_those_of_the_joined_batch(worked: Path, name: str) -> None:
    """In float64, where only the order of sums is left; shares of different sizes, and empty ones."""
    import distributed_worker

    images, labels = distributed_worker.batch()
    model = distributed_worker.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    size = 1 if name == "ddp of 1" else len(labels)
    F.cross_entropy(model(images[:size]), labels[:size]).backward()
    optimizer.step()
    expected = [p.detach() if "stepped" in name else p.grad for p in model.parameters()]
    torch.testing.assert_close(torch.load(worked / "gradients.pt")[name], expected, rtol=1e-12, atol=1e-15)


@pytest.fixture
def alone_in_a_group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(how: str, model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    # Left to itself, FSDP moves a model to the GPU where there is one.
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.children() if how == "fsdp by layer" else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(("how", "fused"), [("ddp", True), ("fsdp", True), ("fsdp by layer", False)])
def test_fused_models_can_be_wrapped(how: str, fused: bool, alone_in_a_group: None, cpu_kernels: None) -> None:
    """`fuse` first, wrap then. Layers sharded one by one gather weights when they are called: as stock."""
    stock = TutorialNet().double()
    model = wrapped(how, fastlenet.fuse(copy.deepcopy(stock)))
    images, labels = torch.randn(4, 1, 32, 32, dtype=torch.float64), torch.arange(4)
    losses = [F.cross_entropy(network(images), labels) for network in (model, stock)]
    nodes, seen = [losses[0].grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(type(node).__name__)
        nodes += [onward for onward, _ in node.next_functions if onward is not None]
    chain = "ConvReLUMaxPool2d_ConvReLUMaxPool2d_LinearReLU_LinearReLU_LinearChainBackward"
    assert (chain in seen) == fused
    for loss in losses:
        loss.backward()
    grads = [getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)() for parameter in model.parameters()]
    torch.testing.assert_close(grads, [p.grad for p in stock.parameters()], rtol=1e-12, atol=1e-15)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@together
def test_a_resumed_run_of_several_is_exact(worked: Path) -> None:
    """Generators of every process included, and every process ends with the same."""
    found = [torch.load(worked / f"resumed-{rank}.pt") for rank in range(3)]
    for one in found:
        whole, parts = one["history"]
        assert whole == parts
        torch.testing.assert_close(*one["weights"], rtol=0, atol=0)
        assert one["history"] == found[0]["history"]
        assert torch.equal(one["predictions"], found[0]["predictions"])
        torch.testing.assert_close(one["weights"], found[0]["weights"], rtol=0, atol=0)
    whole, parts = (worked / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert {"cpu", "cpu.1", "cpu.2"} == set(checkpoint.load(whole).rng)


@pytest.mark.wide
@together
def test_a_killed_run_goes_on_as_if_nothing_had_happened(worked: Path, alone: loop.TrainResult) -> None:
    """It was killed in its second epoch; the command line takes it to its end."""
    assert checkpoint.load(worked / "killed" / "checkpoint.safetensors").epoch == 1
    done = torchrun("-m", "fastlenet", "train", "--device", "cpu", "--resume", "--output", worked / "killed")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, "one process prints"
    assert lines[1].startswith("epoch 3/3")

    files = [worked / name / "checkpoint.safetensors" for name in ("killed", "unbroken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in (worked / "killed").iterdir()) == ["checkpoint.safetensors", "metrics.json"]
    metrics = json.loads((worked / "killed" / "metrics.json").read_text())
    assert metrics["processes"] == 3
    # One process took the same steps, up to rounding, which a few steps do not yet amplify.
    assert metrics["steps"] == len(alone.losses) == 9
    for ours, single in zip(metrics["epochs"], alone.history, strict=True):
        assert ours["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)
        assert ours["lr"] == single["lr"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nccl needs a GPU")
def test_every_gpu_trains(folder: Path) -> None:
    """Over nccl, with as many processes as there are GPUs, and no GPU named."""
    command = ["-m", "fastlenet", "train", "--data", folder / "digits", "--epochs", 2, "--output", folder / "gpus"]
    done = torchrun(*command, processes=torch.cuda.device_count(), gpus=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "gpus" / "metrics.json").read_text())
    assert metrics["processes"] == torch.cuda.device_count()
    assert metrics["epochs"][1]["train_loss"] < metrics["epochs"][0]["train_loss"]
