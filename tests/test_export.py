import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused

import predict
from model import UNet
from predict import Predictor
from support.errors import BadInput
from support.masks import read_mask
from tools import export
from utils import load_checkpoint, save_checkpoint

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is in requirements-extra.txt")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a random network, for grey photos of 40x56, normalized in its own way."""
    torch.manual_seed(0)
    model = UNet(in_channels=1, features=(4, 8)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {"state_dict": model.state_dict(), "image_size": [40, 56], "threshold": 0.45}
    state["normalization"] = {"mean": [0.4], "std": [0.2], "max_pixel_value": 255.0}
    path = tmp_path_factory.mktemp("own") / "own.pth.tar"
    save_checkpoint(state | {"optimizer": {}, "history": []}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logits", "probabilities", "fp16"])
def test_the_file_gives_pytorchs_answers_to_photos_of_any_size_and_number(
    call, checkpoint, photos, tmp_path, kind, float32
):
    file = tmp_path / "onnx" / "own.onnx"
    flag = [] if kind == "logits" else [f"--{kind}"]
    assert call(export.main, "--checkpoint", checkpoint, "--output", file, *flag)[0] == 0
    assert [path.name for path in file.parent.iterdir()] == ["own.onnx"]
    session = onnxruntime.InferenceSession(file)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", "height", "width", 1])
    assert result.name == ("probabilities" if kind == "probabilities" else "logits")
    content = onnx.load(file)
    facts = {fact.key: fact.value for fact in content.metadata_props}
    assert facts["version"] == export.VERSION and json.loads(facts["image_size"]) == [40, 56]
    kinds = {weights.data_type for weights in content.graph.initializer if len(weights.dims) == 4}
    assert kinds == {getattr(onnx.TensorProto, "FLOAT16" if kind == "fp16" else "FLOAT")}
    ours, exported = Predictor(checkpoint, "cpu"), Predictor(file, "cpu")
    assert (exported.size, exported.channels, exported.threshold) == ((40, 56), 1, 0.45)
    for shape in ((1, 40, 56, 1), (3, 33, 71, 1), (2, 1, 1, 1)):
        batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        difference = (exported.answer(batch) - ours.answer(batch)).abs().max()
        assert difference < (0.02 if kind == "fp16" else 1e-4)
    masks = []
    for network in (checkpoint, file):
        flags = "--checkpoint", network, "--output", tmp_path / network.name, "--device", "cpu"
        assert call(predict.main, photos, *flags, "--tta")[0] == 0
        masks.append([read_mask(path) for path in sorted((tmp_path / network.name).iterdir())])
    assert np.equal(*masks).mean() > 0.99


@pytest.mark.slow
def test_the_file_knows_classes_and_tiles(call, checkpoint, photos, tmp_path, float32):
    state = load_checkpoint(checkpoint)
    for name in ("final_conv.weight", "final_conv.bias"):
        tensor = state["state_dict"][name]
        state["state_dict"][name] = torch.cat([tensor, -tensor])
    state["model"]["out_channels"] = 2
    two, file = tmp_path / "two.pth.tar", tmp_path / "two.onnx"
    save_checkpoint(state | {"classes": ["sky", "road"], "crop": 40, "image_size": [40, 40]}, two)
    assert call(export.main, photos, "--checkpoint", two, "--output", file)[0] == 0
    networks = Predictor(two, "cpu"), Predictor(file, "cpu")
    for network in networks:
        assert (network.classes, network.crop, network.size) == (["sky", "road"], 40, None)
    answers = [network.full_size_logits(min(photos.iterdir())) for network in networks]
    assert answers[0].shape == (2, 48, 72) and np.allclose(*answers, atol=1e-4)


def test_small_weights_keep_what_evaluation_needs_and_give_nearly_the_same(checkpoint, photos):
    file = checkpoint.with_name("small.pth")
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(file)]) == 0
    before, after = load_checkpoint(checkpoint), load_checkpoint(file)
    assert before.keys() - after.keys() == {"optimizer", "history"}
    for name, tensor in after["state_dict"].items():
        assert (tensor.dtype == torch.float16) == (tensor.dim() == 4), name
    photo = min(photos.iterdir())
    whole, small = (Predictor(path, "cpu").probabilities(photo) for path in (checkpoint, file))
    assert np.allclose(whole, small, atol=0.01)


@pytest.mark.slow
def test_a_network_that_answers_otherwise_gets_no_file(call, checkpoint, photos, tmp_path):
    broken = torch.load(checkpoint, weights_only=True)
    broken["state_dict"]["ups.3.conv.4.bias"][:] = 3e38  # numbers still, but inf - inf is none
    broken["state_dict"]["final_conv.weight"][0] = torch.tensor([10.0, -10] * 2)[:, None, None]
    save_checkpoint(broken, tmp_path / "broken.pth.tar")
    file = tmp_path / "out" / "own.onnx"
    flags = "--checkpoint", tmp_path / "broken.pth.tar", "--output", file
    assert_refused(call(export.main, photos, *flags), "probabilities differ by at most inf")
    assert list(file.parent.iterdir()) == []


def test_differences_beyond_the_tolerance_are_refused():
    logits = np.linspace(-1, 1, 2000, dtype=np.float32)[None, None]
    assert "at most 0.0e+00" in export.check_answers([(logits, logits.copy())], 0.5, fp16=False)
    for other in (logits + np.float32(0.01), np.where(abs(logits) < 0.001, -logits, logits)):
        with pytest.raises(BadInput, match="does not give PyTorch's answers"):
            export.check_answers([(logits, other)], 0.5, fp16=False)


@pytest.mark.parametrize("flags", ["nowhere", "--output /dev/null/x.onnx", "--output x.bin"])
def test_what_makes_no_sense_is_refused_in_a_line(call, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(export.main, *flags.split()))
    assert list(tmp_path.iterdir()) == []
    Path("text.onnx").write_text("nonsense")
    assert_refused(call(export.main, "--checkpoint", "text.onnx"), "text.onnx: cannot be used")


def write_onnx(path, metadata):
    """Write an ONNX file that takes photos as those of export.py do; logits: sums of channels."""
    kinds = onnx.TensorProto
    photos = onnx.helper.make_tensor_value_info("photos", kinds.UINT8, ["n", "h", "w", 3])
    logits = onnx.helper.make_tensor_value_info("logits", kinds.FLOAT, ["n", 1, "h", "w"])
    nodes = [
        onnx.helper.make_node("Cast", ["photos"], ["floats"], to=kinds.FLOAT),
        onnx.helper.make_node("Transpose", ["floats"], ["images"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("ReduceSum", ["images", "channels"], ["logits"]),
    ]
    channels = onnx.helper.make_tensor("channels", kinds.INT64, [1], [1])
    graph = onnx.helper.make_graph(nodes, "sum", [photos], [logits], [channels])
    opset = [onnx.helper.make_opsetid("", export.OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


SAID = {"image_size": "[32, 48]", "threshold": "0.45"}  # by files of version 1.0


def test_files_without_classes_and_crop_are_taken(photos, tmp_path):
    write_onnx(tmp_path / "old.onnx", SAID)
    predictor = Predictor(tmp_path / "old.onnx", "cpu")
    assert (predictor.size, predictor.crop, predictor.classes) == ((32, 48), None, ["object"])
    assert (predictor.mask(min(photos.iterdir())) == 255).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": "[32]"},
        {"image_size": '["a", "b"]'},
        {"threshold": "null"},
        {"classes": "7"},
        {"crop": "[]"},
        {"crop": "\x1b[31m"},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense_are_refused_in_a_line(call, photos, tmp_path, wrong):
    write_onnx(tmp_path / "odd.onnx", SAID | wrong)
    refused = call(predict.main, photos, "--checkpoint", tmp_path / "odd.onnx", "--device", "cpu")
    assert_refused(refused, "odd.onnx: cannot be used", "export it again")
