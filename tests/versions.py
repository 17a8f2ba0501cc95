"""Run the tests with the oldest and the newest PyTorch that can be installed: ``make test-versions``.

``python tests/versions.py FOLDER`` makes an environment in FOLDER for each combination of a Python found on PATH (of
3.10 and 3.13) and a PyTorch (the oldest that the package allows, and the newest of pip's index that has a file for that
Python), with the triton that this PyTorch asks for. It installs the package there with its extra `test`, runs
``tests/run.py`` and keeps its output beside the environment. The last lines are a table; the exit code is 0 only if
every combination passed.

PyTorch from PyPI brings gigabytes of CUDA libraries; a CPU build is taken where pip's settings name an index that has
one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.13")
OLD_NUMPY = "numpy<2.4"
"""With later ones Triton 3.6, which the oldest PyTorch asks for, interprets no kernels."""


def interpreter(version: str) -> Path | None:
    """A Python of that version which can be started; a name on PATH may be a stub of a version manager's."""
    for name in (f"python{version}", "python3", "python"):
        found = shutil.which(name)
        command = [found or "", "-c", "import sys; print(sys.executable, *sys.version_info[:2])"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            continue
        path, *numbers = done.stdout.split()[-3:] if done.returncode == 0 else ("",)
        if ".".join(numbers) == version:
            return Path(path)
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        return path
    return None


def oldest() -> str:
    """The oldest PyTorch that pyproject.toml allows."""
    found = re.search(r'"torch>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def install(python: Path, *arguments: str, log: Path) -> bool:
    """Let the environment's pip install; what it says goes to the log."""
    line = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode == 0


def combination(interpreter: Path, torch: str, folder: Path, options: list[str]) -> tuple[str, str]:
    """Make the environment, run the tests, and return what was installed and how it went."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    subprocess.run([interpreter, "-m", "venv", folder / "environment"], check=True)
    python = folder / "environment" / "bin" / "python"
    wanted = [torch, OLD_NUMPY] if oldest() in torch else [torch]
    if not install(python, *wanted, "-e", ".[test]", log=log):
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        return "-", f"cannot be installed: {lines[-1] if lines else 'see its log'}"
    code = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in ('torch', 'triton')), sep=', ')"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    with open(folder / "tests.log", "w", encoding="utf-8") as file:
        line = [python, ROOT / "tests" / "run.py", *options]
        # That this PyTorch is new is known here; tests count the lines that commands print.
        quiet = os.environ | {"PYTHONWARNINGS": "ignore:fastlenet is tested up to"}
        done = subprocess.run(
            [*map(str, line)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=quiet, check=False
        )
    last = (folder / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
    return versions, f"{'ok' if done.returncode == 0 else 'FAILED'}: {last[0] if last else 'no output'}"


def main(arguments: list[str] | None = None) -> int:
    """Run every combination and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder for environments and logs")
    python = f"a version of Python to test with (may be repeated; default: {' and '.join(PYTHONS)})"
    torch = "a requirement of PyTorch to test with (may be repeated; default: the oldest and the newest)"
    parser.add_argument("--python", action="append", metavar="VERSION", help=python)
    parser.add_argument("--torch", action="append", metavar="REQUIREMENT", help=torch)
    known, options = parser.parse_known_args(arguments)
    folder = known.folder.resolve()
    rows, failed, ran = [], False, False
    for version in known.python or PYTHONS:
        found = interpreter(version)
        for torch in known.torch or (f"torch=={oldest()}.*", "torch"):
            name = f"python{version}-{re.sub(r'[^a-z0-9.]+', '-', torch).strip('-.')}"
            if found is None:
                rows.append((name, "-", "left out: no such Python on this machine"))
                continue
            begin = time.monotonic()
            print(f"{name} ...", flush=True)
            versions, outcome = combination(found, torch, folder / name, options)
            failed, ran = failed or not outcome.startswith("ok"), True
            rows.append((name, versions, f"{outcome} ({time.monotonic() - begin:.0f} s)"))
    print()
    for row in rows:
        print(f"{row[0]:<28}{row[1]:<32}{row[2]}")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
