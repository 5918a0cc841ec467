"""Liger's kernels: who gets them, and that they compute what the plain layers of each family compute."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from programs import LIGER
from transformers import LlamaConfig, MambaConfig

from pipeline.common.errors import UserError
from pipeline.training import liger_internals
from pipeline.training.liger_internals import FAMILIES, uses_liger

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.skipif(not LIGER.exists(), reason="Liger is not installed: make .venv/.liger")
def test_the_results_of_each_family_are_those_of_its_plain_layers() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{LIGER}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.liger_case"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.keys() == FAMILIES.keys()
    for family, of_family in found.items():
        assert of_family["difference"] < 1e-5 and of_family["classes"], family
        assert of_family["rotation"].startswith("liger_kernel"), family
        assert any("GLU" in name for name in of_family["modules"]), family
        assert "LigerRMSNorm" in of_family["modules"], family


def test_auto_takes_liger_on_a_gpu_for_a_family_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_internals, "installed", lambda: True)
    assert uses_liger("auto", LlamaConfig(), GPU) and uses_liger("liger", LlamaConfig(), GPU)
    assert not uses_liger("none", LlamaConfig(), GPU)
    assert not uses_liger("auto", LlamaConfig(), CPU)
    assert not uses_liger("auto", LlamaConfig(hidden_act="gelu"), GPU)
    assert not uses_liger("auto", MambaConfig(), GPU)
    monkeypatch.setattr(liger_internals, "installed", lambda: False)
    assert not uses_liger("auto", LlamaConfig(), GPU)


@pytest.mark.parametrize(
    ("config", "device", "there", "message"),
    [
        (LlamaConfig(), CPU, True, "whose kernels need a GPU"),
        (LlamaConfig(hidden_act="gelu"), GPU, True, "llama model with the activation gelu"),
        (MambaConfig(), GPU, True, "mamba model"),
        (LlamaConfig(), GPU, False, "pip install --no-deps -r requirements-liger.txt"),
    ],
)
def test_liger_that_cannot_be_used_is_an_error_with_a_remedy(
    config: LlamaConfig, device: torch.device, there: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liger_internals, "installed", lambda: there)
    with pytest.raises(UserError, match=message) as error:
        uses_liger("liger", config, device)
    assert "set it to auto" in str(error.value)
