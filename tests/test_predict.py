import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused
from PIL import Image

import predict
import test as evaluation
import utils
from predict import Predictor
from support.errors import BadInput
from support.images import photo_size, read_photo
from support.masks import Labels, read_mask
from utils import BEST_CHECKPOINT, CHECKPOINT, SHIPPED, save_checkpoint


@pytest.fixture
def run(call, network, tmp_path, monkeypatch):
    """Call predict.py in tmp_path: run(*photos and flags) -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: call(predict.main, "--checkpoint", network, "--device", "cpu", *flags)


@pytest.fixture
def photo(photos):
    return min(photos.iterdir())


def names(folder="predictions"):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_file_goes_in_and_a_mask_of_its_own_size_comes_out(network, photo):
    predictor = Predictor(network, "cpu")
    assert (predictor.size, predictor.channels, predictor.threshold) == ((160, 240), 3, 0.5)
    mask, probabilities = predictor.mask(photo), predictor.probabilities(photo)
    assert mask.shape == probabilities.shape == (48, 72)
    assert mask.dtype == np.uint8 and probabilities.dtype == np.float32
    clear = abs(probabilities - 0.5) > 1e-6  # sigmoid rounds
    assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(mask[clear] > 0, probabilities[clear] > 0.5)
    bright = read_photo(photo)[..., 0] > 0.45 * 255
    assert ((mask > 0) == bright).mean() > 0.97
    own_size = Predictor(network, "cpu", height=48, width=72)
    assert ((own_size.mask(photo) > 0) == bright).mean() > 0.999  # nothing was scaled
    assert Predictor(network, "cpu", width=72).size == (160, 72)


def pipe(path):
    """A file's bytes as a stream that can be read only once."""
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(path.read_bytes())
    return open(reader, "rb")


SOURCES = {
    "text": str,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "memory": lambda path: io.BytesIO(path.read_bytes()),
    "pipe": pipe,
    "image": Image.open,
    "array": read_photo,
    "rgba": lambda path: np.pad(read_photo(path), ((0, 0), (0, 0), (0, 1))),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_photo_gives_the_same_whatever_it_comes_from(network, photo, tmp_path, source):
    turned = Image.Exif()
    turned[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.open(photo).save(path, exif=turned)
    predictor = Predictor(network, "cpu")
    mask = predictor.mask(path)
    assert mask.shape == (72, 48)
    for method in (predictor.mask, predictor.probabilities, predictor.cutout):
        given = source(path)
        assert np.array_equal(np.asarray(method(given)), np.asarray(method(path)))
        if hasattr(given, "close"):
            given.close()
    given = source(path)
    assert all(np.array_equal(found, mask) for found in predictor.masks([given, path, given][:2]))
    if hasattr(given, "close"):
        given.close()


def test_several_masks_are_those_of_each_photo_at_its_own_size(network, photos, two_classes):
    paths = sorted(photos.iterdir())[:4]
    small = read_photo(paths[0])[:20, :30]
    sources = [paths[0], small, Image.open(paths[1]), *paths[2:], small]
    for checkpoint in (network, *two_classes):
        predictor = Predictor(checkpoint, "cpu")
        masks = predictor.masks(iter(sources), batch_size=4)
        shapes = [(48, 72), (20, 30), (48, 72), (48, 72), (48, 72), (20, 30)]
        assert [mask.shape for mask in masks] == shapes
        for mask, source in zip(masks, sources, strict=True):
            assert (mask == predictor.mask(source)).mean() > 0.999  # batches round differently
    assert predictor.masks([]) == []
    with pytest.raises(BadInput, match="nowhere.jpg: no such file"):
        predictor.masks([paths[0], "nowhere.jpg"])


def test_a_cutout_is_the_photo_with_its_background_transparent(run, network, photo):
    predictor = Predictor(network, "cpu")
    for threshold in (0.5, 0.51):
        cutout, mask = predictor.cutout(photo, threshold), predictor.mask(photo, threshold)
        assert cutout.mode == "RGBA" and cutout.size == (72, 48)
        assert np.array_equal(np.asarray(cutout)[..., :3], read_photo(photo))
        clear = abs(predictor.probabilities(photo) - threshold) > 0.01
        assert np.array_equal(np.asarray(cutout)[clear, 3] > 127, mask[clear] > 0)
    run(photo, "--cutout")
    with Image.open(f"predictions/{photo.stem}_cutout.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(predictor.cutout(photo)))


@pytest.mark.parametrize("threshold", [0, 0.51, 1])
def test_a_threshold_counts_also_where_it_is_0_or_1(network, photo, threshold):
    predictor = Predictor(network, "cpu")
    mask, probabilities = predictor.mask(photo, threshold), predictor.probabilities(photo)
    assert ((mask > 0) == (probabilities > threshold)).mean() > 0.999


def test_a_mirrored_photo_with_tta_gives_a_mirrored_answer(photo, tmp_path):
    image = Image.open(photo)
    image.save(tmp_path / "photo.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    predictor = Predictor(SHIPPED, "cpu", height=48, width=72, tta=True)
    answers = [predictor.probabilities(tmp_path / f"{n}.png") for n in ("photo", "mirrored")]
    assert np.allclose(answers[0], answers[1][:, ::-1], atol=1e-4)


def test_without_a_checkpoint_the_best_the_latest_or_the_one_that_ships_is_taken(
    network, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict, "ROOT", tmp_path)
    assert Predictor(device="cpu").filename.endswith("unet_carvana.pth")
    for name in (CHECKPOINT, BEST_CHECKPOINT):
        (tmp_path / name).write_bytes(network.read_bytes())
        assert Predictor(device="cpu").filename.endswith(name)


def test_answers_do_not_depend_on_the_batch_and_are_scaled_as_in_evaluation(photos, float32):
    predictor = Predictor(SHIPPED, "cpu", height=64, width=96)
    paths = sorted(photos.iterdir())[:3]
    together = predictor.logits([predictor.read(path) for path in paths])
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(together), (48, 72), mode="bilinear", align_corners=False
    )
    for logits, path in zip(scaled, paths, strict=True):
        assert np.allclose(logits, predictor.full_size_logits(path), atol=1e-4)


def test_each_photo_of_a_folder_gets_a_mask_of_its_own_size(run, photos, network):
    Image.fromarray(np.full((30, 500, 3), 255, np.uint8)).save(photos / "wide.png")
    code, out, err = run(photos, "--batch-size", 3)
    assert code == 0 and err == "" and "11 photos at 160x240 on cpu, into predictions" in out
    assert names() == sorted(f"{p.stem}_mask.png" for p in photos.iterdir())
    for path in photos.iterdir():
        with Image.open(f"predictions/{path.stem}_mask.png") as mask:
            assert mask.mode == "L" and mask.size[::-1] == photo_size(path)


def test_masks_have_the_dice_that_full_size_evaluation_gives_them(call, run, data, tmp_path):
    run(data / "train_images")
    flags = "--checkpoint", tmp_path / "bright.pth.tar", "--full-size", "--device", "cpu"
    folders = "--image-dir", data / "train_images", "--mask-dir", data / "train_masks"
    call(evaluation.main, *folders, *flags, "--output-dir", tmp_path, "--csv", tmp_path / "s.csv")
    for row in Path("s.csv").read_text().splitlines()[1:]:
        name, *_, dice, _ = row.split(",")
        found = read_mask(f"predictions/{name}_mask.png")
        true = read_mask(data / "train_masks" / f"{name}_mask.gif")
        own = 2 * (found & true).sum() / (found.sum() + true.sum())
        assert own == pytest.approx(float(dice), abs=1e-3)


def test_photos_that_lie_on_their_side_or_are_transparent_are_taken(run, photo):
    image, turned = Image.open(photo), Image.Exif()
    turned[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", exif=turned, quality=98)
    image.putalpha(128)
    image.save("alpha.webp", lossless=True)
    code, _, err = run("turned.jpg", "alpha.webp", "--cutout")
    assert code == 0, err
    first, second = (read_mask(f"predictions/{name}_mask.png") for name in ("turned", "alpha"))
    assert (first == second).mean() > 0.97
    with Image.open("predictions/turned_cutout.png") as cutout:
        assert cutout.mode == "RGBA" and cutout.size == (72, 48)


def test_pictures_asked_for_later_are_added_and_fit_the_mask(run, photo):
    Image.new("RGB", (100, 100), (0, 0, 255)).save("sea.png")
    path = photo.with_suffix(".webp")
    Image.open(photo).save(path, lossless=True, icc_profile=b"wide")
    run(path)
    flags = "--cutout", "--overlay", "--probability", 16, "--background", "sea.png"
    assert run(path, *flags)[0] == 0
    kinds = ("background", "cutout", "mask", "overlay", "probability")
    assert names() == [f"{photo.stem}_{kind}.png" for kind in kinds]
    pictures = [Image.open(f"predictions/{photo.stem}_{kind}.png") for kind in kinds]
    profiles = [picture.info.get("icc_profile") for picture in pictures]
    assert profiles == [b"wide", b"wide", None, b"wide", None]
    background, cutout, mask, _, probability = map(np.asarray, pictures)
    clear = abs(probability / 65535 - 0.5) > 0.01
    assert np.array_equal(cutout[clear, 3] > 127, mask[clear] > 0)
    assert np.array_equal(cutout[..., :3], read_photo(path))
    assert (background[cutout[..., 3] == 0] == (0, 0, 255)).all()
    assert np.array_equal(probability[clear] > 32767, mask[clear] > 0)


@pytest.fixture
def two_classes(network, tmp_path):
    """Checkpoints of networks of two classes, what is bright and what is dark: of photos scaled to
    32x48, and of crops."""
    state = torch.load(network, weights_only=True) | {"image_size": [32, 48]}
    weight = torch.zeros(2, 4, 1, 1)
    weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0])
    last = {"final_conv.weight": weight, "final_conv.bias": torch.tensor([-0.45, 0.1])}
    state |= {"state_dict": state["state_dict"] | last, "classes": ["bright", "dark"]}
    for name, crop in (("scaled", None), ("crops", 32)):
        save_checkpoint(state | {"crop": crop}, tmp_path / f"{name}.pth.tar")
    return [tmp_path / "scaled.pth.tar", tmp_path / "crops.pth.tar"]


def test_masks_of_classes_are_their_numbers_under_a_palette_of_their_colours(
    run, photo, two_classes
):
    flags = "--checkpoint", two_classes[0], "--overlay", "--cutout", "--probability"
    assert run(photo, *flags)[0] == 0
    predictor = Predictor(two_classes[0], "cpu")
    mask, probabilities = predictor.mask(photo), predictor.probabilities(photo)
    assert set(np.unique(mask)) == {0, 1, 2} and probabilities.shape == (2, *mask.shape)
    likeliest = 1 + probabilities.argmax(0)
    assert np.array_equal(mask, np.where(probabilities.max(0) > 0.5, likeliest, 0))
    kinds = ("mask", "cutout", "overlay", "probability")
    pictures = [Image.open(f"predictions/{photo.stem}_{kind}.png") for kind in kinds]
    assert pictures[0].mode == "P" and np.array_equal(np.asarray(pictures[0]), mask)
    assert pictures[0].getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert np.array_equal(read_mask(pictures[0].filename, labels=Labels(2)), mask)
    cutout, overlay, grey = map(np.asarray, pictures[1:])
    clear = abs(probabilities.max(0) - 0.5) > 0.01
    assert np.array_equal(cutout[clear, 3] > 127, mask[clear] > 0)
    assert np.array_equal(grey, np.rint(probabilities.max(0) * 255))
    own = np.asarray(Image.open(photo)).astype(int)
    for number, colour in ((0, own), (1, (128, 0, 0)), (2, (0, 128, 0))):
        assert (abs(overlay - (own + colour) / 2)[mask == number] <= 1).all()


def test_a_network_of_crops_sees_a_photo_at_its_own_size_tile_by_tile(run, photo, two_classes):
    predictor, checkpoint = Predictor(two_classes[1], "cpu", tta=True), two_classes[1]
    assert (predictor.size, predictor.crop) == (None, 32)
    model = utils.build_model(utils.load_checkpoint(checkpoint))
    images = torch.tensor(read_photo(photo)).permute(2, 0, 1)[None] / 255
    whole = utils.logits_of(model, images, torch.device("cpu"), tta=True)[0]  # as test.py has it
    assert np.allclose(predictor.full_size_logits(photo), whole, atol=1e-4)
    code, out, _ = run(photo, photo.parent, "--checkpoint", checkpoint, "--tta")
    assert code == 0 and "10 photos in tiles of 32x32 on cpu" in out
    with Image.open(f"predictions/{photo.stem}_mask.png") as mask:
        assert np.array_equal(np.asarray(mask), predictor.mask(photo))
    refused = run(photo, "--checkpoint", checkpoint, "--image-width", 48)
    assert_refused(refused, "--image-width", "at their own size", "leave them out")
    assert_refused(run(photo, "--checkpoint", checkpoint, "--submission", "s.csv"), "2 classes")


BITS = {"--probability PHOTO": "L", "PHOTO --probability": "L", "--probability 8 PHOTO": "L"}
BITS |= {"PHOTO --probability=16": "I;16", "--probability 16 PHOTO": "I;16"}


@pytest.mark.parametrize("flags", BITS)
def test_a_photo_after_a_bare_probability_is_a_photo(run, photo, flags):
    assert run(*flags.replace("PHOTO", str(photo)).split())[0] == 0
    with Image.open(f"predictions/{photo.stem}_probability.png") as picture:
        assert picture.mode == BITS[flags]


def test_what_exists_is_made_again_only_with_overwrite(run, photos):
    run(photos)
    files = sorted(Path("predictions").iterdir())
    for file in files[1:]:
        file.write_text("of an earlier run")
    files[0].unlink()
    code, out, _ = run(photos)
    assert code == 0 and "1 photos at" in out and "9 are done already" in out
    assert [file.read_bytes() == b"of an earlier run" for file in files] == [False] + 9 * [True]
    assert "already" not in run(photos, "--overwrite")[1]
    assert all(read_mask(file).shape == (48, 72) for file in files)


def test_a_threshold_moves_the_mask(run, photo):
    for threshold in ("0.48", "0.55"):
        run(photo, "--threshold", threshold, "--output", threshold)
    low, high = (read_mask(f"{folder}/{photo.stem}_mask.png") for folder in ("0.48", "0.55"))
    assert low.sum() > high.sum() > 0


def test_patterns_mean_the_files_that_fit(run, photos, photo):
    (photos / "more").mkdir()
    assert run(f"{photos}/**/*_01.jpg", f"{photos}/*", photo)[0] == 0 and len(names()) == 10


def test_bad_photos_are_listed_at_the_end_and_stop_no_other(run, photos):
    paths = sorted(photos.iterdir())
    bad, good = paths[:4], paths[4:]
    bad[0].write_bytes(b"")
    bad[1].write_text("no photo at all")
    bad[2].write_bytes(bad[2].read_bytes()[:-600])
    bad[3] = bad[3].rename(bad[3].with_suffix(".png"))
    Image.new("1", (16000, 16000)).save(bad[3])
    code, _, err = run(photos, "--batch-size", 2, "--submission", "s.csv", "--output", "out")
    assert code == 1 and err.startswith("photos that cannot be used (4):\n")
    assert len(err.splitlines()) == 5 and all(path.name in err for path in bad)
    assert names("out") == [f"{path.stem}_mask.png" for path in good]
    assert Path("s.csv").read_text().count("\n") == 1 + len(good)
    code, out, _ = run(photos, "--output", "out")
    assert code == 1 and "4 photos at" in out and "6 are done already" in out
    assert run(*bad, "--submission", "bad.csv")[0] == 2 and not Path("bad.csv").exists()


def test_paths_are_taken_among_the_arguments(network, photo, tmp_path):
    flags = ["--checkpoint", network, "--output", tmp_path / "out", "--device", "cpu"]
    assert predict.main([photo, *flags, "--probability"]) == 0
    assert names(tmp_path / "out") == [f"{photo.stem}_{k}.png" for k in ("mask", "probability")]


def test_photos_of_one_name_are_refused(run, photo):
    Image.open(photo).save(f"{photo.stem}.png")
    code, _, err = run(photo, f"{photo.stem}.png")
    assert code == 2 and "photos of the same name" in err and not Path("predictions").exists()


@pytest.mark.slow
def test_photos_that_were_never_seen_get_masks_of_cars(run, carvana):
    with zipfile.ZipFile(carvana / "kaggle" / "test.zip") as archive:
        for name in sorted(archive.namelist())[1:24:6]:
            archive.extract(name)
    code, _, err = run("test", "--checkpoint", SHIPPED, "--cutout", "--background", "teal")
    assert code == 0 and len(names()) == 12, err
    for path in Path("predictions").glob("*_mask.png"):
        mask = read_mask(path)
        assert mask.shape == (1280, 1918)
        assert 0.08 < mask.mean() / 255 < 0.42  # as masks of this challenge do
        assert mask[:200].mean() < 2.5 and mask[-100:].mean() < 2.5


# The page docs/predicting.md


def block_of_page(heading):
    """The Python code under a heading of the page."""
    page = (ROOT / "docs" / "predicting.md").read_text()
    return re.search(f"^## {heading}$.*?```python\n(.*?)```", page, re.M | re.S)[1]


def test_the_pages_lines_of_python_run(network, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "ROOT", tmp_path)
    network.rename(BEST_CHECKPOINT)
    Image.open(photo).save("car.jpg")
    found = {}
    exec(block_of_page("From Python"), found)
    assert len(found["masks"]) == 3
    assert all((mask == found["mask"]).mean() > 0.999 for mask in found["masks"])
    with Image.open("car_cutout.png") as cutout:
        assert cutout.mode == "RGBA" and cutout.size == (72, 48)


@pytest.mark.slow
def test_the_pages_five_lines_of_onnxruntime_run(network, photo, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in requirements-extra.txt")
    from tools import export

    monkeypatch.chdir(tmp_path)
    Image.open(photo).save("car.jpg", quality=95)
    assert export.main(["--checkpoint", network]) == 0
    exec(block_of_page("Export to ONNX"), {})
    with Image.open("car_mask.png") as mask:
        same = (np.asarray(mask) > 0) == (Predictor(network, "cpu").mask("car.jpg") > 0)
    assert same.shape == (48, 72) and same.mean() > 0.98
