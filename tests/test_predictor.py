import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import predictor as module
from checkpoints import BEST_CHECKPOINT, CHECKPOINT, SHIPPED
from files import BadInput, read_photo
from predictor import Predictor, scale, sigmoid


def test_a_file_goes_in_and_a_mask_of_its_own_size_comes_out(network, photos):
    photo = min(photos.iterdir())
    predictor = Predictor(network, "cpu")
    assert (predictor.size, predictor.channels, predictor.threshold) == ((160, 240), 3, 0.5)
    mask, probabilities = predictor.mask(photo), predictor.probabilities(photo)
    assert mask.shape == probabilities.shape == (48, 72)
    assert mask.dtype == np.uint8 and probabilities.dtype == np.float32
    assert set(np.unique(mask)) == {0, 255} and np.array_equal(mask > 0, probabilities > 0.5)
    bright = read_photo(photo)[..., 0] > 0.45 * 255
    assert ((mask > 0) == bright).mean() > 0.97
    assert np.array_equal(predictor.mask(photo, 0.51) > 0, probabilities > 0.51)


def test_a_mirrored_photo_with_tta_gives_a_mirrored_answer(photos, tmp_path):
    Image.open(min(photos.iterdir())).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        tmp_path / "mirrored.png"
    )
    Image.open(min(photos.iterdir())).save(tmp_path / "photo.png")
    predictor = Predictor(ROOT / SHIPPED, "cpu", height=48, width=72, tta=True)
    photo, mirrored = (
        predictor.probabilities(tmp_path / f"{n}.png") for n in ("photo", "mirrored")
    )
    assert np.allclose(photo, mirrored[:, ::-1], atol=1e-4)


def test_the_size_can_be_another_than_in_training(network, photos):
    predictor = Predictor(network, "cpu", height=48, width=72)
    assert predictor.size == (48, 72)
    assert Predictor(network, "cpu", width=72).size == (160, 72)
    photo = min(photos.iterdir())
    bright = read_photo(photo)[..., 0] > 0.45 * 255
    assert ((predictor.mask(photo) > 0) == bright).mean() > 0.999  # nothing was scaled


def test_without_a_checkpoint_the_best_the_latest_or_the_one_that_ships_is_taken(
    network, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "weights").mkdir()
    for name in (SHIPPED, CHECKPOINT, BEST_CHECKPOINT):
        (tmp_path / name).write_bytes(network.read_bytes())
        assert Predictor(device="cpu").filename.endswith(name)


def test_answers_do_not_depend_on_the_batch(photos):
    predictor = Predictor(ROOT / SHIPPED, "cpu", height=64, width=96)
    batch = [predictor.read(photo) for photo in sorted(photos.iterdir())[:3]]
    together = predictor.logits(batch)
    for logits, photo in zip(together, batch, strict=True):
        assert np.allclose(logits, predictor.logits([photo])[0], atol=1e-4)


def test_scaling_is_that_of_full_size_evaluation():
    logits = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None, None], (128, 191), mode="bilinear", align_corners=False
    )
    assert np.allclose(scale(logits, (128, 191)), expected[0, 0].numpy(), atol=1e-5)
    assert np.allclose(sigmoid(logits.copy()), 1 / (1 + np.exp(-logits)), atol=1e-6)


@pytest.mark.parametrize("name", ["none.pth.tar", "none.onnx", "text.onnx"])
def test_what_is_no_network_is_refused(tmp_path, name):
    (tmp_path / "text.onnx").write_text("nonsense")
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="onnxruntime is in requirements-extra.txt")
    with pytest.raises(BadInput, match=name):
        Predictor(tmp_path / name, "cpu")
