"""Errors for the user, with messages of one line, and optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """The user's input cannot be used. The message is one line, to be shown unchanged."""


class MissingPackageError(ImportError):
    """An optional package is not installed. The message is one line with the command that installs it."""


class KernelError(RuntimeError):
    """A compiled CPU kernel cannot be had: compiling, linking or loading it failed."""


def import_extra(name: str, install: str = "fastlenet[demo]") -> ModuleType:
    """Import an optional package at the moment it is needed.

    Args:
        name: dotted module name, such as ``"rich.progress"``.
        install: the requirement to give to pip.

    Raises:
        MissingPackageError: if the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        # A module missing inside an installed package means a broken installation: show that error unchanged.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingPackageError(f"the package {package} is not installed: pip install '{install}'") from error
