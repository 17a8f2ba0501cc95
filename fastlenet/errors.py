"""Errors for the user, whose message is one line, and optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line, made to be shown as it stands."""


class MissingPackageError(ImportError):
    """An optional package is not installed. The message is one line with the command that installs it."""


class KernelError(RuntimeError):
    """A compiled CPU kernel cannot be had: compiling, linking or loading it failed."""


def import_extra(name: str, install: str = "fastlenet[demo]") -> ModuleType:
    """Import an optional package at the moment it is needed.

    Args:
        name: dotted module name, such as ``"rich.progress"``.
        install: what to hand to pip to get it.

    Raises:
        MissingPackageError: if the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        # A missing module inside an installed package is a broken installation: show that as it is.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingPackageError(f"the package {package} is not installed: pip install '{install}'") from error
