"""Checkpoints: one safetensors file that holds everything a training run needs to go on as if it had never stopped.

Tensors (parameters, buffers, the optimizer's per-parameter state, random generator states) are stored as such;
everything else is JSON in the file's metadata. Nothing is pickled, so loading a foreign file runs no code. A digest
over both parts tells a damaged file from a good one: safetensors by itself checks only the layout. The same training
state always gives the same bytes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlenet.errors import InputError, import_extra
from fastlenet.files import atomic_write
from fastlenet.training.distributed import World

FORMAT = "fastlenet-checkpoint"
VERSION = 1


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to something else."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        epoch: number of finished epochs.
        step: number of finished optimizer steps.
        config: the run's options, as JSON values.
        history: one record per finished epoch, as JSON values.
        model: the model's `state_dict`, on the CPU.
        optimizer: the optimizer's `state_dict`, on the CPU.
        rng: generator states, as `rng_states` names them.
    """

    epoch: int
    step: int
    config: dict[str, Any]
    history: list[dict[str, Any]]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the stored state into `model` and `optimizer`; both are checked before either is touched.

        Args:
            model: a model with the same parameter and buffer names, shapes and dtypes; on any device.
            optimizer: an optimizer of the same kind over the same parameters.

        Raises:
            CheckpointError: if the checkpoint does not fit; the message names the first differences.
        """
        check_model(self.model, model.state_dict())
        stored, wanted = (
            [(sorted(group), group["params"]) for group in state["param_groups"]]
            for state in (self.optimizer, optimizer.state_dict())
        )
        if stored != wanted:
            raise CheckpointError("the checkpoint's optimizer is of another kind or steps other parameters")
        model.load_state_dict(self.model)
        # A copy, because the optimizer would go on to step the very tensors it is given.
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))


def check_model(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint's state dict has the names, shapes and dtypes of a model's.

    Raises:
        CheckpointError: if they differ; the message names the first differences.
    """
    problems = [f"no {name}" for name in wanted if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in wanted]
    problems += [
        f"{name} is {_describe(stored[name])}, expected {_describe(value)}"
        for name, value in wanted.items()
        if name in stored and _describe(stored[name]) != _describe(value)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"the checkpoint does not fit the model: {', '.join(problems[:3])}{more}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def rng_states(world: World) -> dict[str, Tensor]:
    """Collect the states of the generators that the processes of a run draw from, on every process.

    They are named by the type of device, beyond the first process with its rank: ``"cpu"``, ``"cpu.1"``.
    """
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    states = enumerate(world.gather(own))
    return {_of_rank(name, rank): state for rank, some in states for name, state in some.items()}


def set_rng_states(states: Mapping[str, Tensor], world: World) -> None:
    """Put the generator states of a checkpoint back, those of this process.

    A run that moved to another kind of device restores what applies there. A process that was not there before keeps
    its own states.

    Raises:
        CheckpointError: if a state is not one that this PyTorch understands.
    """
    cpu, cuda = (states.get(_of_rank(name, world.rank)) for name in ("cpu", "cuda"))
    try:
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and world.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, world.device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's random generator state does not fit this PyTorch: {error}") from error


def _of_rank(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}.{rank}"


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: Mapping[str, Tensor],
    **state: Any,
) -> None:
    """Write a checkpoint, atomically: a crash at any moment leaves the previous file whole.

    The arguments are those of `Checkpoint`. The optimizer's state must consist of tensors and JSON values, as in every
    class of `torch.optim`.

    Raises:
        MissingPackageError: if safetensors is not installed.
        InputError: if the file cannot be written.
    """
    kept = optimizer.state_dict()
    values = {f"{index}.{name}": value for index, own in kept["state"].items() for name, value in own.items()}
    parts = {"model": model.state_dict(), "rng": rng, "optimizer": values}
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    tensors = {
        f"{part}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, named in parts.items()
        for name, value in named.items()
        if isinstance(value, Tensor)
    }
    plain = {
        str(index): {name: value for name, value in own.items() if not isinstance(value, Tensor)}
        for index, own in kept["state"].items()
    }
    state["optimizer"] = {"state": plain, "param_groups": kept["param_groups"]}
    body = {"format": FORMAT, "version": VERSION, "digest": _digest(state, tensors), "state": state}
    # One metadata entry: safetensors keeps several in no fixed order, and equal runs must give equal files.
    metadata = {FORMAT: json.dumps(body, allow_nan=False)}
    atomic_write(path, import_extra("safetensors.torch").save(tensors, metadata))


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint and check that it is whole.

    Args:
        path: a file that `save` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, or no checkpoint of this library.
        MissingPackageError: if safetensors is not installed.
    """
    name = os.fspath(path)
    safetensors = import_extra("safetensors")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {name}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {name} is damaged or no safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise CheckpointError(f"{name} is a safetensors file but no {FORMAT}")
    try:
        body = json.loads(metadata[FORMAT])
        version, digest, state = body["version"], body["digest"], body["state"]
        if version != VERSION:
            raise CheckpointError(f"checkpoint {name} has version {version}; this fastlenet reads version {VERSION}")
        if digest != _digest(state, tensors):
            raise CheckpointError(f"checkpoint {name} is damaged: its content does not match its digest")
        optimizer = state["optimizer"]
        parts: dict[str, Any] = {"model": {}, "rng": {}}
        optimizer["state"] = {int(index): values for index, values in optimizer["state"].items()}
        for key, tensor in tensors.items():
            part, _, rest = key.partition(".")
            if part == "optimizer":
                index, _, rest = rest.partition(".")
                optimizer["state"][int(index)][rest] = tensor
            else:
                parts[part][rest] = tensor
        return Checkpoint(**state, **parts)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {name} is damaged: {error!r}") from error


def _digest(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash the whole content: the JSON part and every tensor's name, dtype, shape and bytes."""
    # Through JSON and back, so that tuples and lists, which JSON does not tell apart, hash alike.
    digest = hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {_describe(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
