"""What importing costs: little time, and nothing that only some users need."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

# Modules that wait until something needs them: triton, and what only the command line and its extras use.
LATER = (
    "triton",
    "rich",
    "matplotlib",
    "numpy.testing",
    "mlxtend",
    "PIL",
    "safetensors",
    "pandas",
    "torchvision",
    "onnx",
)
LIMIT_SECONDS = 0.2
ROOT = Path(__file__).resolve().parent.parent


def fresh(code: str) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """The modules among `LATER` that `statement` loads, after torch."""
    code = f"import json, sys, torch; before = set(sys.modules); {statement}; after = set(sys.modules) - before"
    return set(json.loads(fresh(f"{code}; print(json.dumps(sorted(after)))"))) & set(LATER)


@pytest.mark.wide
def test_import_adds_little_to_torchs():
    """At most 0.2 s of this process's time, by the median of five fresh interpreters."""
    code = "import time, torch; t = time.process_time(); import fastlenet; print(time.process_time() - t)"
    assert statistics.median(float(fresh(code)) for _ in range(5)) <= LIMIT_SECONDS


@pytest.mark.parametrize(
    "use",
    [
        "pass",
        "fastlenet.LeNet()(torch.ones(2, 1, 32, 32)).sum().backward()",
        "fastlenet.explain(fastlenet.LeNet())",
        "fastlenet.backend(torch.ones(1))",
    ],
)
def test_what_nobody_asked_for_stays_unloaded(use):
    """Neither importing the package nor using it on the CPU loads triton."""
    assert not loaded_by(f"import fastlenet; {use}")


@pytest.mark.wide
def test_the_help_loads_no_extras():
    """`fastlenet --help` answers without any of them either."""
    statement = "from fastlenet.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    names = set(json.loads(fresh(code).splitlines()[-1]))
    assert not names & set(LATER)
    assert "torch._dynamo" not in names


def test_a_checkout_that_is_not_installed_says_what_to_do(tmp_path):
    """There the kernels are not where Python looks for them."""
    shutil.copytree(ROOT / "fastlenet", tmp_path / "fastlenet")
    code = (
        "import sys\n"
        "sys.path.insert(0, '.')\n"
        # The finder of an editable installation, which knows where the kernels are.
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "import fastlenet"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    folder = tmp_path / "fastlenet"
    expected = f"ImportError: fastlenet is not installed: run 'pip install -e .' in the checkout that holds {folder}"
    assert done.stderr.splitlines()[-1] == expected
