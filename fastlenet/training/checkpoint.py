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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlenet.errors import InputError, import_extra
from fastlenet.files import atomic_write

FORMAT = "fastlenet-checkpoint"
VERSION = 1

_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng."


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
        optimizer_state: per-parameter state: for each index, the names and values (tensors, numbers or None).
        param_groups: the optimizer's parameter groups, as JSON values.
        rng: generator states by device type, and by rank beyond the first process: uint8 tensors.
    """

    epoch: int
    step: int
    config: dict[str, Any]
    history: list[dict[str, Any]]
    model: dict[str, torch.Tensor]
    optimizer_state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    rng: dict[str, torch.Tensor] = field(default_factory=dict)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the stored state into `model` and `optimizer`; both are checked before either is touched.

        Args:
            model: a model with the same parameter and buffer names, shapes and dtypes; on any device.
            optimizer: an optimizer of the same kind over the same parameters.

        Raises:
            CheckpointError: if the checkpoint does not fit; the message names the first differences.
        """
        check_model(self.model, model.state_dict())
        groups = optimizer.state_dict()["param_groups"]
        if [(sorted(group), group["params"]) for group in groups] != [
            (sorted(group), group["params"]) for group in self.param_groups
        ]:
            raise CheckpointError("the checkpoint's optimizer is of another kind or steps other parameters")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in self.optimizer_state.items():
            if not 0 <= index < len(parameters):
                raise CheckpointError(f"the checkpoint has optimizer state for parameter {index} of {len(parameters)}")
            for name, value in values.items():
                # Adam's step count is a single number beside tensors shaped like the parameter.
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameters[index].shape:
                    raise CheckpointError(
                        f"the checkpoint's optimizer state {name} of parameter {index} has shape "
                        f"{tuple(value.shape)}, expected {tuple(parameters[index].shape)}"
                    )
        model.load_state_dict(self.model)
        # JSON has no tuples: give each option (such as Adam's betas) the type the optimizer itself uses.
        restored = [
            {key: tuple(value) if isinstance(group[key], tuple) else value for key, value in stored.items()}
            for group, stored in zip(groups, self.param_groups, strict=True)
        ]
        # A copy, because the optimizer would go on to step the very tensors it is given.
        optimizer.load_state_dict({"state": copy.deepcopy(self.optimizer_state), "param_groups": restored})


def check_model(stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
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


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Take the states of PyTorch's generators that a run on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def merge_rng(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the generator states of several processes, in the order of their ranks, under names of their own."""
    return {_of_rank(name, rank): state for rank, some in enumerate(states) for name, state in some.items()}


def _of_rank(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}.{rank}"


def set_rng_state(states: Mapping[str, torch.Tensor], device: torch.device, rank: int = 0) -> None:
    """Put the generator states of a checkpoint back, those of this process.

    A run that moved to another kind of device restores what applies there. A process that was not there before keeps
    its own states.

    Raises:
        CheckpointError: if a state is not one that this PyTorch understands.
    """
    cpu, cuda = states.get(_of_rank("cpu", rank)), states.get(_of_rank("cuda", rank))
    try:
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda, device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's random generator state does not fit this PyTorch: {error}") from error


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    step: int,
    config: Mapping[str, Any],
    history: list[dict[str, Any]],
    rng: Mapping[str, torch.Tensor],
) -> None:
    """Write a checkpoint, atomically: a crash at any moment leaves the previous file whole.

    The arguments are those of `Checkpoint`. The optimizer's state must consist of tensors and JSON values, as in every
    class of `torch.optim`.

    Raises:
        MissingPackageError: if safetensors is not installed.
        InputError: if the file cannot be written.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    tensors |= {_RNG + name: tensor for name, tensor in rng.items()}
    optimizer_state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {str(index): {} for index in optimizer_state["state"]}
    for index, values in optimizer_state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{name}"] = value
            else:
                plain[str(index)][name] = value
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    state = {
        "epoch": epoch,
        "step": step,
        "config": dict(config),
        "history": history,
        "optimizer": {"state": plain, "param_groups": optimizer_state["param_groups"]},
    }
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
        return _assemble(state, tensors)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {name} is damaged: {error!r}") from error


def _assemble(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    optimizer_state = {int(index): dict(values) for index, values in state["optimizer"]["state"].items()}
    for key, tensor in under(_OPTIMIZER).items():
        index, _, name = key.partition(".")
        optimizer_state[int(index)][name] = tensor
    return Checkpoint(
        **{name: state[name] for name in ("epoch", "step", "config", "history")},
        model=under(_MODEL),
        optimizer_state=optimizer_state,
        param_groups=state["optimizer"]["param_groups"],
        rng=under(_RNG),
    )


def _digest(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the whole content: the JSON part and every tensor's name, dtype, shape and bytes."""
    # Through JSON and back, so that tuples and lists, which JSON does not tell apart, hash alike.
    digest = hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {_describe(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
