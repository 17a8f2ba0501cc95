"""`tests/versions.py`: which Python and PyTorch it takes, and that it says what it leaves out or cannot install."""

from __future__ import annotations

import subprocess
import sys

import pytest
import versions
from packaging.requirements import Requirement


def test_a_python_is_found_by_what_it_is():
    current = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = versions.interpreter(current)
    assert found is not None
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    assert subprocess.run([found, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == current
    assert versions.interpreter("3.99") is None


def test_the_oldest_pytorch_is_the_packages_own_limit():
    requirement = Requirement(f"torch>={versions.oldest()}")
    text = (versions.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{requirement}"' in text


def test_a_run_of_nothing_fails_and_names_what_it_left_out(tmp_path, capsys):
    assert versions.main([str(tmp_path / "v"), "--python", "3.99"]) == 1
    assert capsys.readouterr().out.count("left out: no such Python on this machine") == 2


@pytest.mark.wide
@pytest.mark.parametrize("installed", [False, True])
def test_outcomes_are_told(tmp_path, monkeypatch, capsys, installed):
    """The versions that were installed, and the test runner's last line; or pip's."""
    asked = []

    def install(python, *arguments, log):
        asked.append(arguments)
        log.write_text("gathering\nno file of that version\n")
        return installed

    monkeypatch.setattr(versions, "install", install)
    current = f"{sys.version_info.major}.{sys.version_info.minor}"
    # The runner stops at an option that it does not know, in an environment that lacks pytest in any case.
    arguments = [str(tmp_path), "--python", current, "--torch", "torch==2.11.*", "--jobs", "none"]
    assert versions.main(arguments) == 1
    assert asked == [("torch==2.11.*", "numpy<2.4", "-e", ".[test]")]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"python{current}-torch-2.11")
    assert ("FAILED: " if installed else "cannot be installed: no file of that version") in row
