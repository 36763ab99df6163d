"""What only a GPU can show: python -m pytest -m torture tests/test_gpu.py"""

import pytest
import torch
from conftest import assert_same_run, rows, start, wait_for_epoch

from utils import CHECKPOINT

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = "--device", "cuda", "--augment", "flip"


def end_of(process):
    """What a process that ends well printed since."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def test_a_killed_run_ends_as_one_never_killed(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end_of(start(data, whole, "--epochs", 3, *CUDA))
    process = start(data, killed, "--epochs", 3, "--save-every", 1, *CUDA)
    wait_for_epoch(process, 1)
    process.kill()
    process.communicate()
    end_of(start(data, killed, "--load-model", *CUDA))
    assert_same_run(whole, killed)


def test_a_run_goes_from_a_cpu_to_a_gpu_and_back(data, tmp_path):
    end_of(start(data, tmp_path, "--epochs", 1))
    for epochs, flags in ((2, CUDA), (3, ("--device", "cpu"))):
        out = end_of(start(data, tmp_path, "--load-model", "--epochs", epochs, *flags))
        assert f"on {flags[1]}" in out and (tmp_path / CHECKPOINT).exists()
    assert len(rows(tmp_path)) == 3
    assert all(float(row["train_loss"]) < 1 for row in rows(tmp_path))
