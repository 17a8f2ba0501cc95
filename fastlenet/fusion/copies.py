"""Copies of a model: one that shares its tensors, and one that shares nothing."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HANDLE = "_fastlenet_fused"
"""The attribute of a fused model with the facts that `fuse` keeps."""


def sharing(model: nn.Module) -> nn.Module:
    """Copy a model module by module without calling its code. Tensors and other objects are shared.

    Modules are new, and so are the lists, dicts, tuples and sets on them. References to modules of the model in these,
    and bound methods, refer to the copies.
    """
    return _Copier(apart=False).copy(model)


def apart(model: nn.Module) -> nn.Module:
    """Copy a model with its tensors, so that running the copy changes nothing of the model.

    An object that cannot be copied, such as a lock, is shared.
    """
    return _Copier(apart=True).copy(model)


class _Copier:
    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self.memo: dict[int, Any] = {}
        self.kept: list[Any] = []  # ids in the memo stay valid

    def copy(self, value: Any) -> Any:
        known = self.memo.get(id(value))
        if known is not None:
            return known
        self.kept.append(value)
        if isinstance(value, torch.jit.ScriptModule):
            return self._remember(value, copy.deepcopy(value) if self.apart else copy.copy(value))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._remember(value, self._tensor(value)) if self.apart else value
        if isinstance(value, RemovableHandle):
            # It refers to a module's dict of hooks, which was copied with the module.
            return self._remember(value, copy.deepcopy(value, self.memo))
        if isinstance(value, types.MethodType):
            owner = self.copy(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) in (dict, OrderedDict, defaultdict):
            new = self._remember(value, value.copy())
            for key, item in value.items():
                new[key] = self.copy(item)
            return new
        if type(value) is list:
            new = self._remember(value, [])
            new.extend(self.copy(item) for item in value)
            return new
        if type(value) in (tuple, set):
            return type(value)(self.copy(item) for item in value)
        if self.apart and not isinstance(value, (type, types.FunctionType, types.ModuleType)):
            with contextlib.suppress(Exception):
                return self._remember(value, copy.deepcopy(value, self.memo))
        return value

    def _remember(self, value: Any, new: Any) -> Any:
        self.memo[id(value)] = new
        return new

    def _module(self, module: nn.Module) -> nn.Module:
        new = self._remember(module, object.__new__(type(module)))
        state = {name: value for name, value in vars(module).items() if name not in ("_compiled_call_impl", HANDLE)}
        # Dicts of hooks first: handles elsewhere on the module refer to them.
        for name in sorted(state, key=lambda name: not name.endswith("_hooks")):
            new.__dict__[name] = self.copy(state[name])
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, with its type."""
        if torch.nn.parameter.is_lazy(tensor):
            # Not by deepcopy, which refuses a lazy buffer.
            kind: Any = type(tensor)
            lazy: Tensor = kind(tensor.requires_grad, tensor.data.device, tensor.data.dtype)
            vars(lazy).update(vars(tensor))
            return lazy
        with torch.inference_mode(False), torch.no_grad():
            new = tensor.detach().clone()
            if type(new) is not type(tensor) and isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            vars(new).update(vars(tensor))
            return new.requires_grad_(tensor.requires_grad)
