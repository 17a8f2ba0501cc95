"""The package as it would be published: built, checked, installed apart from the checkout, and used there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlenet

pytest.importorskip("build")
pytest.importorskip("twine")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.wide, pytest.mark.xdist_group("package")]


def run(*command: object, **options: object) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The source archive and the wheel, built from what git has, with the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no git repository to take the files from")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    [archive] = (folder / "dist").glob("*.tar.gz")
    [wheel] = (folder / "dist").glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def python(files, tmp_path_factory):
    """The Python of an environment that has the wheel, and of the present one what else is installed there."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", files[1])
    # After the environment's own, so that the wheel comes first; an editable installation is no part of these folders.
    present = [path for path in sys.path if Path(path).name == "site-packages"]
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "present.pth").write_text("\n".join(present))
    return python


def test_files_are_fit_for_the_index(files):
    assert [path.name for path in files] == [
        f"fastlenet-{fastlenet.__version__}.tar.gz",
        f"fastlenet-{fastlenet.__version__}-py3-none-any.whl",
    ]
    printed = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files)
    assert printed.count("PASSED") == 2


def test_nothing_is_missing_and_nothing_too_much(files):
    """The wheel holds every module and data file of the package and of the kernels, and no other top-level name."""
    names = {name for name in zipfile.ZipFile(files[1]).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastlenet").rglob("*.py")} | {
        "fastlenet/py.typed"
    }
    for pattern in ("*.py", "*.json"):
        expected |= {f"fastlenet/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob(pattern)}
    assert names == expected
    with tarfile.open(files[0]) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"fastlenet", "kernels", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= top
    assert not top & {"tests", "bench", "docs", ".venv"}


def test_it_works_away_from_the_checkout(files, python, tmp_path):
    """Operators, the compiler's backend by its entry point, and the command line."""
    code = """
import torch, fastlenet, fastlenet.kernels.geometry
torch.manual_seed(0)
fused, stock = fastlenet.LeNet(), fastlenet.StockLeNet()
stock.load_state_dict(fused.state_dict())
images = torch.randn(64, 1, 32, 32)
torch.testing.assert_close(fused(images), stock(images))
fused(images).square().sum().backward()
torch.testing.assert_close(torch.compile(stock, backend="fastlenet")(images), stock(images))
assert "fastlenet" in torch.compiler.list_backends()
print(fastlenet.__file__, fastlenet.kernels.geometry.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": environment | {"OMP_NUM_THREADS": "1"}}
    for path in run(python, "-c", code, **where).split():
        assert Path(path).is_relative_to(python.parent.parent)
    command = python.parent / "fastlenet"
    assert run(command, "--version", **where) == f"fastlenet {fastlenet.__version__}\n"
    assert '"backend"' in run(command, "env", **where)
    refused = subprocess.run([command, "bench"], capture_output=True, text=True, check=False, **where)
    assert refused.returncode == 2
    assert "runs in a checkout only" in refused.stderr


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]


def test_the_issue_form_asks_for_the_environment():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml").read_text(encoding="utf-8"))
    [field] = [field for field in form["body"] if field["id"] == "environment"]
    assert "fastlenet env" in field["attributes"]["label"]
    assert field["validations"]["required"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == fastlenet.__version__
