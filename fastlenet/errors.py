"""Errors for the user, with messages of one line, and optional packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

# The folder that holds the package: the project root in a source checkout.
ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """The user's input cannot be used. The message is one line, to be shown unchanged."""


class MissingPackageError(ImportError):
    """An optional package is not installed. The message is one line with the command that installs it."""


class KernelError(RuntimeError):
    """A compiled CPU kernel cannot be had: compiling, linking or loading it failed."""


def install_command(requirement: str) -> str:
    """Say how to install an extra, such as ``"fastlenet[demo]"``: from a checkout, as fastlenet is not on PyPI."""
    extra = requirement.removeprefix("fastlenet")
    if (ROOT / "pyproject.toml").is_file():  # the package runs in a checkout and stays so
        return f"pip install -e '{ROOT}{extra}'"
    return f"run pip install '.{extra}' in a checkout of fastlenet"


def import_extra(name: str, install: str = "fastlenet[demo]") -> ModuleType:
    """Import an optional package at the moment it is needed.

    Args:
        name: dotted module name, such as ``"rich.progress"``.
        install: the extra that brings it, see `install_command`.

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
        raise MissingPackageError(f"the package {package} is not installed: {install_command(install)}") from error
