"""Checkpoints: written whole, and refused in one line where they are not what they should be."""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from checkpoints import build_model, load_checkpoint, save_checkpoint, save_weights
from files import BadInput
from model import UNet

CPU = torch.device("cpu")


@contextlib.contextmanager
def takes_at_most(megabytes):
    """The block takes no more memory, where Linux tells."""

    def peak():
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024

    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak()
    yield
    assert peak() - before < megabytes


def checkpoint_of(model):
    return {"state_dict": model.state_dict(), "optimizer": {}}


def test_a_classic_checkpoint_says_what_it_does_not_say(tmp_path):
    model = UNet(in_channels=1, features=(4, 8))
    save_checkpoint(checkpoint_of(model), tmp_path / "classic.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "classic.pth.tar")
    assert checkpoint["model"] == {"in_channels": 1, "out_channels": 1, "features": [4, 8]}
    assert checkpoint["image_size"] == [160, 240] and checkpoint["threshold"] == 0.5
    assert checkpoint["normalization"] == {"mean": 0.0, "std": 1.0, "max_pixel_value": 255.0}
    x = torch.rand(1, 1, 16, 16)
    loaded = build_model(checkpoint, "classic.pth.tar", CPU)
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(checkpoint_of(UNet(features=(4, 8))), "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bare pickle").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"state_dict": RunsCode()}, "code")
    torch.save([1, 2], "list")
    torch.save({"state_dict": OrderedDict(weight=torch.ones(1))}, "other network")
    state = UNet(features=(4, 8)).state_dict()
    del state["bottleneck.conv.0.weight"]
    torch.save({"state_dict": state}, "key missing")
    for name, reason in {
        "cut": "cut off",
        "text": "no checkpoint",
        "empty": "no checkpoint",
        "folder": "cannot be read",
        "bare pickle": "no checkpoint",
        "code": "could run code",
        "list": "no dict with a state_dict",
        "other network": "tensors such as downs.0.conv.0.weight.* expected, weight found",
        "key missing": "bottleneck.conv.0.weight is missing",
        "nowhere": "no such checkpoint.*python train.py",
    }.items():
        with pytest.raises(BadInput, match=f"{name}: .*{reason}") as problem:
            build_model(load_checkpoint(name), name, CPU)
        assert len(str(problem.value).splitlines()) == 1
    assert not os.path.exists("hacked")


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "checkpoint"
    save_checkpoint(checkpoint_of(UNet(features=(4, 8))), path)
    before = path.read_bytes()
    script = (
        "import resource, sys, torch\n"
        "from dataset import BadInput\n"
        "from utils import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save_checkpoint({'state_dict': {'w': torch.rand(1_000_000)}}, sys.argv[1])\n"
        "except BadInput as problem:\n"
        "    sys.exit(str(problem))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr
    assert str(path) in done.stderr and "Traceback" not in done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint"]


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    script = (
        "import sys, torch\n"
        "from utils import save_checkpoint\n"
        "state = {'w': torch.rand(4_000_000)}\n"
        "while True:\n"
        "    save_checkpoint({'state_dict': state}, sys.argv[1])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT)
    while not path.exists():
        assert writer.poll() is None
        time.sleep(0.05)
    for moment in (0.03, 0.01, 0.05, 0.02):
        time.sleep(moment)
        assert len(torch.load(path, weights_only=True)["state_dict"]["w"]) == 4_000_000
    writer.kill()
    writer.wait()
    assert len(torch.load(path, weights_only=True)["state_dict"]["w"]) == 4_000_000


def test_weights_to_pass_on_are_small_and_score_the_same(tmp_path, float32):
    model = UNet(features=(8, 16)).eval()
    model.downs[0].conv[1].running_var[:] = 1e-9  # which float16 would make 0
    state = {"state_dict": model.state_dict(), "optimizer": {"big": torch.zeros(10**5)}}
    state |= {"image_size": [64, 96], "threshold": 0.4}
    save_checkpoint(state, tmp_path / "checkpoint")
    save_weights(tmp_path / "checkpoint", tmp_path / "weights.pth")
    sizes = [(tmp_path / name).stat().st_size for name in ("weights.pth", "checkpoint")]
    assert sizes[0] < 0.2 * sizes[1]
    loaded = load_checkpoint(tmp_path / "weights.pth")
    assert loaded["image_size"] == [64, 96] and loaded["threshold"] == 0.4
    assert loaded["model"] == {"in_channels": 3, "out_channels": 1, "features": [8, 16]}
    assert (loaded["state_dict"]["downs.0.conv.1.running_var"] == 1e-9).all()
    same = build_model(loaded, "weights.pth", CPU)
    images = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.allclose(same(images), model(images), atol=0.02)


def declared(*shape):
    """A tensor of one number that says it has many."""
    return torch.zeros(1).expand(*shape)


def damaged(**changes):
    """The weights of a small network with some of them others."""
    weights = UNet(features=(4, 8)).state_dict()
    for name, value in changes.items():
        weights[name.replace("__", ".")] = value
    return {"state_dict": weights}


BIG = {f"downs__{i}__conv__0__weight": torch.zeros(8, 3, 0, 0) for i in range(2, 20)}


@pytest.mark.parametrize(
    "state, line",
    [
        (damaged(final_conv__weight=3), "tensors such as.*were expected"),
        (damaged(final_conv__bias="1"), "final_conv.bias: a tensor was expected, str found"),
        (damaged(extra=torch.zeros(1)), "extra is unexpected"),
        (damaged(downs__1__conv__4__bias=torch.zeros(9)), r"\[8\] was expected, \[9\] found"),
        (damaged(final_conv__bias=torch.tensor([torch.nan])), "nan or inf found"),
        (damaged(final_conv__bias=torch.zeros(1, dtype=torch.int64)), "float32 was expected"),
        (damaged(final_conv__bias=torch.zeros(1).to_sparse()), "more than the file holds"),
        (
            damaged(downs__0__conv__0__weight=declared(10**9, 3, 3, 3)),
            "8192 channels were expected",
        ),
        (damaged(bottleneck__conv__0__weight=declared(16, 8, 3, 3)), "more than the file holds"),
        (damaged() | {"optimizer": [{"a": declared(10**12)}]}, "more than the file holds"),
        (damaged(**BIG), "12 levels"),
        (damaged(downs__0__conv__0__weight=torch.zeros(4, 7, 3, 3)), "from 7 to 1 found"),
        (damaged() | {"image_size": [10**9, 10**9]}, "image_size"),
        (damaged() | {"image_size": [16384, 16384]}, "16777216 pixels were expected"),
        (damaged() | {"image_size": "ab"}, "image_size"),
        (damaged() | {"threshold": 0}, "threshold"),
        (damaged() | {"threshold": [[[]]]}, "threshold"),
        (damaged() | {"normalization": {"mean": 0}}, "normalization"),
        (
            damaged() | {"normalization": {"mean": 0, "std": [0, 1, 1], "max_pixel_value": 1}},
            "normalization",
        ),
        (damaged() | {"val_fraction": "half"}, "val_fraction"),
    ],
)
def test_absurd_checkpoints_are_refused_by_what_was_expected_and_found(tmp_path, state, line):
    torch.save(state, tmp_path / "strange")
    with (
        takes_at_most(200),
        pytest.raises(BadInput, match=f"strange: .*{line}") as problem,
    ):
        load_checkpoint(tmp_path / "strange")
    assert len(str(problem.value).splitlines()) == 1 and str(problem.value).count(": ") >= 2


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_not_unpacked(tmp_path):
    torch.save(damaged(extra=torch.zeros(10**6)), tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert os.path.getsize(tmp_path / "bomb") < 100_000
    with pytest.raises(BadInput, match="bomb: is compressed"):
        load_checkpoint(tmp_path / "bomb")
    content = (tmp_path / "plain").read_bytes()
    size = (4 * 10**6).to_bytes(4, "little")
    assert content.count(size) >= 2
    lying = content.replace(size, (2**31).to_bytes(4, "little"))
    (tmp_path / "lying").write_bytes(lying)
    with pytest.raises(BadInput, match="lying: declares|lying: no checkpoint"):
        load_checkpoint(tmp_path / "lying")


def test_the_format_of_old_pytorch_is_refused_with_the_remedy(tmp_path):
    torch.save(damaged(), tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="old: .*before PyTorch 1.6.*save it again"):
        load_checkpoint(tmp_path / "old")
