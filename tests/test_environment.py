"""`fastlenet env` holds what a bug report needs, and nothing that it must not hold."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

import fastlenet
from fastlenet import environment
from fastlenet.cli import main


def test_variables_that_matter_are_recorded_and_no_others(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    variables = environment.collect()["variables"]
    assert variables["TRITON_CACHE_DIR"] == "somewhere"
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "secret" not in variables.values()


def test_backend_says_what_runs_and_why(monkeypatch):
    monkeypatch.delenv("FASTLENET_BACKEND", raising=False)
    record = environment.collect()["backend"]
    assert record["setting"] == "auto"
    taken = ("triton",) if torch.cuda.is_available() else ("cpu: a compiled CPU kernel", "aten: the input is on cpu")
    assert record["takes"].startswith(taken)
    with fastlenet.use_backend("aten"):
        assert environment.collect()["backend"] == {"setting": "aten", "takes": "aten: backend 'aten' is forced"}


def test_a_setting_that_cannot_be_is_shown_not_raised(monkeypatch):
    monkeypatch.setenv("FASTLENET_BACKEND", "cublas")
    record = environment.collect()
    assert record["backend"]["setting"] == "cublas"
    assert "must be one of" in record["backend"]["takes"]
    assert record["variables"]["FASTLENET_BACKEND"] == "cublas"
    json.dumps(record, allow_nan=False)


def test_gpus_and_packages_are_listed():
    record = environment.collect()
    assert len(record["gpus"]) == torch.cuda.device_count()
    assert all(gpu["architecture"] and gpu["memory_bytes"] > 0 for gpu in record["gpus"])
    assert record["packages"]["pytest"] == pytest.__version__
    assert record["cpu"]["vectors"] == torch.backends.cpu.get_cpu_capability()


def test_whoever_copied_the_files_knows_their_commit_best(monkeypatch):
    """A copy's repository may stand at another commit, so that git's word on changes means nothing either."""

    def git(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "stale\n" if "rev-parse" in command else "")

    monkeypatch.setattr(subprocess, "run", git)
    monkeypatch.delenv("FASTLENET_COMMIT", raising=False)
    record = environment.collect()
    assert (record["commit"], record["dirty"]) == ("stale", False)
    monkeypatch.setenv("FASTLENET_COMMIT", "fresh")
    record = environment.collect()
    assert (record["commit"], record["dirty"]) == ("fresh", None)


def test_env_command_prints_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(json.dumps(environment.collect())) | {"clocks": record["clocks"]}
    for key in ("device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "threads", "clocks"):
        assert key in record
    assert record["torch"] == torch.__version__
    assert record["precision"] == {
        "cudnn.conv": torch.backends.cudnn.conv.fp32_precision,
        "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
    }


@pytest.mark.wide
def test_the_environment_imports_no_triton() -> None:
    program = "import sys, fastlenet.environment as e; e.collect(); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("gpu", "cpu", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "any", "nvidia-h100-80gb-hbm3"),
        (None, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c-cpu-2-70ghz"),
        (None, "AMD EPYC", "cpu-amd-epyc"),
    ],
)
def test_device_slug(monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str, slug: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(environment, "cpu_model", lambda: cpu)
    assert environment.device_slug() == slug


def test_nvidia_smi_is_read_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked = "nvidia-smi" in command and "--id=GPU-abc-1" in command
        return subprocess.CompletedProcess(command, 0, "550.10, 1980, 2619, 1980, [N/A], 700.00, 31\n" if asked else "")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setenv("FASTLENET_BACKEND", "none")  # so that no tensor is made on the GPU that is not there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"abc-{index}"))
    monkeypatch.setattr(torch.version, "hip", None)
    record = environment.collect()
    assert record["driver"] == "550.10"
    assert record["clocks"] == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "max_sm_mhz": 1980.0,
        "max_memory_mhz": None,
        "power_limit_w": 700.0,
        "temperature_c": 31.0,
    }
