"""Checkpoints: written whole, read as untrusted input, refused in one line."""

import os
import pickle
import zipfile
from functools import partial

import pytest
import torch
from conftest import ROOT, rows

import train
from model import UNet
from support import checkpoint_files, checkpoints
from support.errors import BadInput
from support.run import EpochProgress
from utils import CHECKPOINT, build_model, load_checkpoint, save_checkpoint


def classic(weights=None, **facts):
    """A classic checkpoint with some of its tensors, and what it says beside them, others."""
    weights = UNet(features=(4, 8)).state_dict() | (weights or {})
    return {"state_dict": weights, "optimizer": {}} | facts


def refused(path, line="checkpoint|does not fit model.py"):
    with pytest.raises(BadInput, match=line) as problem:
        load_checkpoint(path)
    assert problem.value.path == path and problem.value.remedy
    assert len(str(problem.value).splitlines()) == 1 and len(str(problem.value)) < 600


def test_a_classic_checkpoint_says_what_it_does_not_say(tmp_path):
    model, other = (UNet(1, features=(4, 8)).eval() for _ in range(2))
    save_checkpoint({"state_dict": model.state_dict(), "optimizer": {}}, tmp_path / "classic")
    checkpoint = load_checkpoint(tmp_path / "classic", other)
    assert checkpoint["model"] == {"in_channels": 1, "out_channels": 1, "features": [4, 8]}
    assert checkpoint["image_size"] == [160, 240] and checkpoint["threshold"] == 0.5
    assert checkpoint["normalization"] == {"mean": 0.0, "std": 1.0, "max_pixel_value": 255.0}
    x = torch.rand(1, 1, 16, 16)
    assert torch.equal(other(x), model(x))
    assert torch.allclose(build_model(checkpoint)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("version, size, loss", [("60dd799", 16, 4.6084), ("398d319", 16, 5.4795)])
def test_a_run_that_an_earlier_version_stopped_can_be_resumed(version, size, loss):
    checkpoint = load_checkpoint(ROOT / "tests" / "files" / f"stopped_by_{version}.pth.tar")
    assert build_model(checkpoint)(torch.rand(1, 3, 16, 24)).isfinite().all()
    assert checkpoints.check_history(checkpoint["history"]) == checkpoint["history"]
    progress = EpochProgress(**checkpoints.progress_of(checkpoint))
    assert (progress.batches_done, progress.photos_done) == (2, 4)
    assert round(progress.loss_sum, 4) == loss


def test_a_finished_run_leaves_plain_values_under_the_classic_keys(trained):
    checkpoint = torch.load(trained / CHECKPOINT, weights_only=True)
    assert checkpoint["state_dict"].keys() == UNet(features=(4, 8)).state_dict().keys()
    assert checkpoint["image_size"] == [32, 48] and checkpoint["model"]["features"] == [4, 8]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"state_dict": RunsCode()}, "code")
    torch.save(classic(optimizer=RunsCode()), "beside")
    for path in tmp_path.glob("*"):
        refused(path)
    assert not os.path.exists("hacked")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save(classic(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(classic(optimizer={"moment": torch.zeros(10**6)}), tmp_path / "cut")
    packed = zipfile.ZipFile(tmp_path / "unpacks to more", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "cut") as whole, packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    os.truncate(tmp_path / "cut", 10**6)
    (tmp_path / "empty").touch(), (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    for path in set(tmp_path.iterdir()):
        refused(path)
    refused(tmp_path / "nowhere", "python train.py")


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": {"downs.0.conv.0.weight": torch.zeros(4, 3, 3, 3)}},
        {"state_dict": [1, 2]},
        {"weights": {}},
        [1, 2],
        classic({"final_conv.weight": 3}),
        classic({"final_conv.bias": "text"}),
        classic({"bottleneck.conv.0.weight": torch.zeros(9, 8, 3, 3)}),
        classic({"more\n": torch.zeros(2)}),
        classic({"final_conv.bias": torch.tensor([torch.nan])}),
        classic({"downs.0.conv.0.weight": torch.zeros(4, 7, 3, 3)}),
        classic({"downs.0.conv.0.weight": torch.zeros(1).expand(10**9, 3, 3, 3)}),
        classic(image_size=[10**9, 10**9]),
        classic(image_size=[0, 9]),
        classic(threshold=0),
        classic(normalization={"mean": 0}),
        classic(normalization={"mean": 0, "std": [0, 1, 1], "max_pixel_value": 1}),
        classic(val_fraction="half"),
        classic(settings=[1]),
    ],
)
def test_contents_that_make_no_sense_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "strange")
    refused(tmp_path / "strange")


def test_rows_of_a_history_may_have_other_columns_but_need_their_epoch_and_dice():
    row = {"epoch": 1, "dice": 0.5}
    history = [row | {"threshold": 0.5}, row | {"epoch": 2, "iou": 0.4}]
    assert checkpoints.check_history(history) == history
    for wrong in (row | {"epoch": 2}, row | {"dice": torch.nan}, row | {"dice": "a"}, {"epoch": 1}):
        with pytest.raises(checkpoint_files.UNUSABLE):
            checkpoints.check_history([wrong])


def test_a_history_whose_rows_lack_a_column_is_resumed(fit, finished):
    checkpoint = load_checkpoint(finished / CHECKPOINT)
    for row in checkpoint["history"]:
        del row["iou"], row["learning_rate"]
    save_checkpoint(checkpoint, finished / CHECKPOINT)
    code, _, err = fit("run", "--load-model", "--epochs", 3)
    assert code == 0, err
    assert [row["iou"] != "" for row in rows(finished)] == [False, False, True]


def steps(kind, change, forget=False):
    """A weight after two steps; between them the optimizer's state is saved, changed and loaded."""
    weight, state = torch.ones(4, 3, 3, 3, requires_grad=True), {}
    for gradient in torch.arange(216.0).view(2, 4, 3, 3, 3):
        optimizer = train.OPTIMIZERS[kind]([weight], 0.1)
        checkpoints.load_optimizer(optimizer, optimizer.state_dict() | {"state": state})
        weight.grad = gradient
        optimizer.step()
        kept = optimizer.state[weight].items()
        state = {} if forget else {0: {name: change(value) for name, value in kept}}
    return weight


@pytest.mark.parametrize("kind", [*train.OPTIMIZERS, "sgd", "rmsprop"])
def test_an_optimizers_state_is_taken_over_in_any_memory_layout_and_no_other_shape(kind):
    turned = steps(kind, lambda value: value.mT.contiguous().mT if value.dim() else value)
    assert torch.equal(turned, steps(kind, lambda value: value))
    fresh = steps(kind, lambda value: value, forget=True)
    for change in (lambda value: value.flatten()[:2], lambda value: torch.zeros(7)):
        assert torch.equal(steps(kind, change), fresh), "with a state that does not fit"


@pytest.fixture(autouse=True)
def more_optimizers(monkeypatch):
    """Optimizers that people add, by one line each."""
    sgd = partial(torch.optim.SGD, momentum=0.9)
    monkeypatch.setitem(train.OPTIMIZERS, "sgd", sgd)
    monkeypatch.setitem(train.OPTIMIZERS, "rmsprop", torch.optim.RMSprop)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, request):
    resource = pytest.importorskip("resource", reason="sets one of Unix's limits")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited))
    save_checkpoint(classic(), tmp_path / "checkpoint")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    with pytest.raises(BadInput, match="checkpoint: cannot be written"):
        save_checkpoint({"state_dict": {"w": torch.rand(10**6)}}, tmp_path / "checkpoint")
    assert load_checkpoint(tmp_path / "checkpoint") and os.listdir(tmp_path) == ["checkpoint"]


def test_a_data_worker_that_dies_during_a_save_is_no_full_disk(tmp_path, monkeypatch):
    def die(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        save_checkpoint(classic(), tmp_path / "checkpoint")
