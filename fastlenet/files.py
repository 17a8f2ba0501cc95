"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastlenet.errors import InputError


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: at any time it has the whole old content or the whole new content.

    The bytes are written to a temporary file in the same folder and synced to the disk. Then the file is renamed.
    Missing parent folders are made. If `path` is a symbolic link, the file that it points to is replaced.

    Args:
        path: the file to write.
        data: its new content.

    Raises:
        InputError: if the file cannot be written. Then no temporary file stays.
    """
    target = Path(os.path.realpath(path))
    # With the process id in its name, two runs in one folder do not share a temporary file.
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
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically.

    Raises:
        ValueError: if `value` has NaN or infinity, which JSON cannot express.
        InputError: if the file cannot be written.
    """
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
