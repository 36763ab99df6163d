"""What only a GPU can show: python -m pytest -m torture tests/test_gpu.py"""

import pytest
import torch
from conftest import assert_same, assert_same_run, rows, start, wait_for_epoch

from dataset import get_loaders
from support.loading import DeviceLoader
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


def test_batches_from_the_gpu_are_those_of_a_data_loader_bit_for_bit(data):
    folders = data / "train_images", data / "train_masks", None, None
    options = {"size": (16, 24), "augment": "flip"}
    moved = get_loaders(*folders, 4, device=torch.device("cuda"), **options)
    for usual, loader in zip(get_loaders(*folders, 4, **options), moved, strict=True):
        assert isinstance(loader, DeviceLoader)
        assert_same(list(map(list, usual)), [[part.cpu() for part in batch] for batch in loader])


def test_photos_lie_on_the_gpu_and_a_killed_run_ends_as_one_never_killed(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "lie in the memory of cuda" in end_of(start(data, whole, "--epochs", 3, *CUDA))
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
