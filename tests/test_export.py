import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

import export
import predict
from checkpoints import SHIPPED, save_checkpoint
from export import check_answers
from files import BadInput, read_mask
from model import UNet
from predictor import Predictor

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is in requirements-extra.txt")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a random network, for photos of 40x56, with a normalization of its own."""
    torch.manual_seed(0)
    model = UNet(features=(4, 8)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    normalization = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "max_pixel_value": 255.0}
    state = {
        "state_dict": model.state_dict(),
        "image_size": [40, 56],
        "normalization": normalization,
        "threshold": 0.45,
    }
    path = tmp_path_factory.mktemp("own") / "own.pth.tar"
    save_checkpoint(state, path)
    return path


@pytest.fixture(scope="module", params=["logits", "probabilities", "fp16"])
def exported(checkpoint, request):
    """(kind, file): the checkpoint as ONNX."""
    file = checkpoint.parent / request.param / "own.onnx"
    flag = [] if request.param == "logits" else [f"--{request.param}"]
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(file), *flag]) == 0
    return request.param, file


def test_the_file_gives_pytorchs_answers_to_photos_of_any_size_and_number(
    checkpoint, exported, float32
):
    kind, file = exported
    session = onnxruntime.InferenceSession(file)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert given.name == "photos" and given.type == "tensor(uint8)"
    assert given.shape == ["batch", "height", "width", 3]
    assert result.name == ("probabilities" if kind == "probabilities" else "logits")
    predictor = Predictor(checkpoint, "cpu")
    rng = np.random.default_rng(0)
    for shape in ((1, 40, 56, 3), (3, 33, 71, 3), (2, 1, 1, 3)):
        batch = rng.integers(0, 256, shape).astype(np.uint8)
        (found,) = session.run(None, {"photos": batch})
        expected = predictor.answer(batch)[:, None]
        expected = 1 / (1 + np.exp(-expected)) if kind == "probabilities" else expected
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < (0.02 if kind == "fp16" else 1e-4)


def test_the_file_says_size_threshold_and_version(exported):
    kind, file = exported
    assert [path.name for path in file.parent.iterdir()] == ["own.onnx"]
    content = onnx.load(file)
    facts = {fact.key: fact.value for fact in content.metadata_props}
    assert json.loads(facts["image_size"]) == [40, 56]
    assert json.loads(facts["threshold"]) == 0.45 and facts["version"] == export.VERSION
    predictor = Predictor(file, "cpu")
    assert (predictor.size, predictor.channels, predictor.threshold) == ((40, 56), 3, 0.45)
    kinds = {weights.data_type for weights in content.graph.initializer if len(weights.dims) == 4}
    half = onnx.TensorProto.FLOAT16
    assert kinds == {half if kind == "fp16" else onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_predict_runs_it_with_the_same_masks(
    call, checkpoint, exported, photos, tmp_path, tta, float32
):
    for name, file in (("torch", checkpoint), ("onnx", exported[1])):
        flags = "--checkpoint", file, "--output", tmp_path / name, "--device", "cpu"
        code, _, err = call(predict.main, photos, *flags, *tta)
        assert code == 0, err
    for path in (tmp_path / "torch").iterdir():
        same = read_mask(path) == read_mask(tmp_path / "onnx" / path.name)
        assert same.mean() > (0.99 if exported[0] == "fp16" else 0.999)


def test_a_network_that_answers_otherwise_gets_no_file(call, checkpoint, photos, tmp_path):
    broken = torch.load(checkpoint, weights_only=True)
    weights = broken["state_dict"]  # numbers still, but what comes of them is none
    last = max(name for name in weights if name.startswith("ups") and name.endswith("conv.4.bias"))
    weights[last][:] = 3e38
    weights["final_conv.weight"][:] = 10.0
    weights["final_conv.weight"][:, ::2] = -10.0
    save_checkpoint(broken, tmp_path / "broken.pth.tar")
    file = tmp_path / "out" / "own.onnx"
    flags = "--checkpoint", tmp_path / "broken.pth.tar", "--output", file
    code, _, err = call(export.main, photos, *flags)
    assert code == 2 and "probabilities differ by at most inf" in err
    assert list(file.parent.iterdir()) == []


def test_differences_beyond_the_tolerance_are_refused():
    logits = np.linspace(-1, 1, 2000, dtype=np.float32).reshape(40, 50)
    assert "at most 0.0e+00" in check_answers([(logits, logits.copy())], 0.5, fp16=False)
    with pytest.raises(BadInput, match="otherwise"):
        check_answers([(logits, logits + np.float32(0.01))], 0.5, fp16=False)
    flipped = logits.copy()
    flipped[np.abs(flipped) < 0.001] *= -1
    with pytest.raises(BadInput, match="otherwise"):
        check_answers([(logits, flipped)] * 2, 0.5, fp16=False)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["nowhere"], "nowhere: no such photo"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["--output", "/dev/null/x.onnx"], "cannot be written"),
        (["--output", "x.bin"], "x.bin: no ONNX file"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(call, tmp_path, monkeypatch, flags, line):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(export.main, *flags)
    assert code == 2 and line in err and list(tmp_path.iterdir()) == []


def test_real_photos_get_pytorchs_masks(call, carvana, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(carvana / "kaggle" / "test.zip") as archive:
        for name in sorted(archive.namelist())[1::4]:
            archive.extract(name)
    code, out, err = call(export.main, "test", "--checkpoint", ROOT / SHIPPED)
    assert code == 0 and "on 9 photos" in out, err
