"""`fastlenet env` holds what a bug report needs, and nothing that it must not hold."""

from __future__ import annotations

import json

import torch

import fastlenet
from fastlenet import environment


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
    assert set(record["packages"]) <= set(environment._PACKAGES)
    assert "pytest" in record["packages"]
    assert record["cpu"]["vectors"] == torch.backends.cpu.get_cpu_capability()


def test_whoever_copied_the_files_knows_their_commit_best(monkeypatch):
    """A copy's repository may stand at another commit, so that git's word on changes means nothing either."""
    monkeypatch.setattr(environment, "_git", lambda command, *_: {"rev-parse": "stale", "status": ""}[command])
    monkeypatch.delenv("FASTLENET_COMMIT", raising=False)
    record = environment.collect()
    assert (record["commit"], record["dirty"]) == ("stale", False)
    monkeypatch.setenv("FASTLENET_COMMIT", "fresh")
    record = environment.collect()
    assert (record["commit"], record["dirty"]) == ("fresh", None)
