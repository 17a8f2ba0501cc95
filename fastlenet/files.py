"""Writing files so that a name always holds a whole file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastlenet.errors import InputError


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that its name always holds either the whole old content or the whole new content.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the name. Missing parent
    folders are made. A symbolic link keeps pointing where it did; the file behind it is the one replaced.

    Args:
        path: the file to write.
        data: its new content.

    Raises:
        InputError: if the file cannot be written there; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    # The process id keeps two runs that share a folder from writing into each other's temporary file.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse to sync a folder; the file itself is complete either way.
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically.

    Raises:
        ValueError: if `value` holds NaN or infinity, which JSON has no word for.
        InputError: if the file cannot be written.
    """
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
