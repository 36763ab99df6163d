"""Several classes, ignored pixels, groups and crops, from masks' files to scores and resuming."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import NETWORK, SMALL, assert_refused, assert_same_run, rows
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import test as evaluation
import train
import utils
from dataset import CarvanaDataset, car_id, get_loaders, split_by_car, to_channels
from support.cache import Cache
from support.masks import IGNORED, Labels
from support.pairs import Pair, find_pairs
from support.scores import label_map
from support.tiles import in_tiles
from utils import LOSSES, check_accuracy, predicted_masks, score_batch, without_ignored

CLASSES = ("--classes", "bright", "dim")


@pytest.fixture
def scenes(tmp_path):
    """Photos of a bright and a dim square; masks of 0, 1, 2, and 9 in a corner. Odd sizes."""
    rng, folder = np.random.default_rng(0), tmp_path / "scenes"
    for name in ("train_images", "train_masks"):
        (folder / name).mkdir(parents=True)
    for number in range(8):
        height, width = 41 + number, 60 - number
        photo = rng.integers(0, 40, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for value, level in ((1, 200), (2, 90)):
            top, left = rng.integers(0, 20), rng.integers(0, 14) + 24 * (value - 1)
            place = np.s_[top : top + 20, left : left + 20]
            photo[place] += np.uint8(level)
            mask[place] = value
        mask[-4:, -4:] = 9
        Image.fromarray(photo).save(folder / "train_images" / f"{'abcd'[number % 4]}{number}.png")
        Image.fromarray(mask).save(folder / "train_masks" / f"{'abcd'[number % 4]}{number}.png")
    return folder


@pytest.fixture
def learn(call, scenes, tmp_path):
    """Train on the scenes: learn(folder, *flags) -> (code, stdout, stderr)."""

    def learn(folder, *flags):
        folders = ["--data-dir", scenes, "--output-dir", tmp_path / folder, "--ignore", 9]
        small = NETWORK if "--crop" in flags else SMALL
        return call(train.main, *folders, *small, "--loss", "bce-dice", *flags)

    return learn


# Tensors and scores


def test_a_mask_becomes_a_channel_a_class_and_minus_one_where_it_is_ignored():
    mask = np.array([[0, 1], [2, IGNORED]], np.uint8)
    channels = to_channels(mask, Labels(2, (), 9))
    assert channels.tolist() == [[[0, 1], [0, -1]], [[0, 0], [1, -1]]]
    assert label_map(channels).tolist() == [[0, 1], [2, 0]]
    assert to_channels(255 * mask[:1], Labels()).tolist() == [[[0, 1]]]


def test_a_pixel_is_of_its_likeliest_class_if_that_is_above_the_threshold():
    logits = torch.tensor([[2.0, -1, 1, -3], [1.0, -2, 3, 5], [0.5, -4, 3, -9]]).view(1, 3, 1, 4)
    assert label_map(predicted_masks(logits, 0.5)).tolist() == [[[1, 0, 2, 2]]]
    assert label_map(predicted_masks(logits, 0.97)).tolist() == [[[0, 0, 0, 2]]]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_classes_is_the_mean_of_theirs_and_ignored_pixels_move_nothing(loss):
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 8, 8), (torch.rand(2, 3, 8, 8) > 0.7).float()
    each = [LOSSES[loss](logits[:, [k]], masks[:, [k]]) for k in range(3)]
    assert LOSSES[loss](logits, masks).allclose(torch.stack(each).mean(0))

    masks[:, :, :3] = -1
    logits.requires_grad_()
    LOSSES[loss](*without_ignored(logits, masks)).sum().backward()
    assert not logits.grad[:, :, :3].any() and logits.grad[:, :, 3:].all()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_of_classes_agree_with_numpy_and_leave_out_what_is_ignored(batch_size, capsys):
    torch.manual_seed(1)
    logits, true = torch.randn(5, 3, 9, 7), torch.randint(0, 3, (5, 9, 7))
    masks = torch.stack([true == 1, true == 2, true == 3], 1).float()  # the third does not come
    logits[:, 2] -= 50
    masks[:, :, :2] = -1
    model = nn.Identity()
    model.final_conv = nn.Conv2d(1, 3, 1)
    loader = zip(logits.split(batch_size), masks.split(batch_size), strict=True)
    found = check_accuracy(loader, model, "cpu", classes=("a", "b", "c"))

    wanted = label_map(masks).numpy()[:, 2:]
    predicted = label_map(predicted_masks(logits, 0.5)).numpy()[:, 2:]
    scores = {}
    for number, name in ((1, "a"), (2, "b")):
        one, other = wanted == number, predicted == number
        scores[f"dice {name}"] = 2 * (one & other).sum() / (one.sum() + other.sum())
        scores[f"iou {name}"] = (one & other).sum() / (one | other).sum()
    for what in ("dice", "iou"):
        scores[what] = (scores[f"{what} a"] + scores[f"{what} b"]) / 2
    assert {name: found[name] for name in scores} == pytest.approx(scores, abs=1e-6)
    right, pixels = (wanted == predicted).sum(), wanted.size
    assert "dice c" not in found and found["accuracy"] == pytest.approx(right / pixels)
    assert f"Got {right}/{pixels} " in capsys.readouterr().out


def test_marking_everything_is_scored_beside():
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, :2], masks[1, 0, :1] = 1, 1
    scores = score_batch(torch.ones(2, 1, 4, 4), masks)
    assert scores["constant"].equal(scores["dice"])


# Groups


def test_what_the_regular_expression_finds_stays_on_one_side():
    names = "Image_01L", "Image_01R", "other"
    assert [car_id(name, r"_(\d+)[LR]") for name in names] == ["01", "01", "other"]
    pairs = [Pair(f"{patient}_{slice}", "", "") for patient in range(9) for slice in range(5)]
    train_pairs, val_pairs = split_by_car(pairs, 0.3, r"^(\d)_")
    sides = [{pair.name[0] for pair in side} for side in (train_pairs, val_pairs)]
    assert not sides[0] & sides[1] and len(val_pairs) % 5 == 0


# Whole runs


def test_classes_are_learned_evaluated_and_written_as_what_they_are(learn, call, tmp_path):
    code, out, err = learn("run", *CLASSES, "--epochs", 25, "--augment", "flip", "--batch-size", 2)
    assert code == 0, err
    last = rows(tmp_path / "run")[-1]
    assert {"dice bright", "iou bright", "dice dim", "iou dim"} < last.keys()
    assert max(float(row["dice bright"]) for row in rows(tmp_path / "run")) > 0.6

    checkpoint = utils.load_checkpoint(tmp_path / "run" / "best_checkpoint.pth.tar")
    assert checkpoint["classes"] == ["bright", "dim"] and checkpoint["model"]["out_channels"] == 2
    code, out, err = call(evaluation.main, "--output-dir", tmp_path / "run", "--full-size")
    assert code == 0 and "  dim    " in out and "marking everything" in out, err
    colours = np.asarray(Image.open(tmp_path / "run" / "saved_images" / "gt_0.png"))
    assert {(0, 0, 0), (128, 0, 0), (0, 128, 0)} <= set(map(tuple, colours.reshape(-1, 3).tolist()))


@pytest.mark.parametrize("flags", [CLASSES, (*CLASSES, "--crop", 32), ("--mask-value", 1, 2)])
def test_a_run_of_classes_or_crops_resumes_as_if_never_stopped(learn, tmp_path, flags):
    for folder, parts in (("whole", [2]), ("parts", [1, 2])):
        for epochs in parts:
            code, _, err = learn(folder, *flags, "--epochs", epochs, "--load-model")
            assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_rare_classes_count_more_where_that_is_asked_for(learn, tmp_path, scenes):
    counts = np.zeros(3)
    for pair in split_by_car(find_pairs(scenes / "train_images", scenes / "train_masks"))[0]:
        mask = np.asarray(Image.open(pair.mask))
        counts += [(mask == value).sum() for value in range(3)]
    flags = *CLASSES, "--epochs", 1, "--crop", 64, "--class-weights"
    code, out, err = learn("auto", *flags, "auto")
    assert code == 0, err
    found = re.search(r"Class weights: bright ([\d.]+), dim ([\d.]+)\n", out)
    expected = np.sqrt(counts.max(initial=0, where=[False, True, True]) / counts)[1:]
    assert np.allclose([float(found[1]), float(found[2])], expected, atol=0.01)
    losses = [rows(tmp_path / "auto")[0]["train_loss"]]
    for name, weights in (("same", found.groups()), ("other", (1, 3))):
        assert learn(name, *flags, *weights)[0] == 0
        losses.append(rows(tmp_path / name)[0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]
    for weights in (("1",), ("1", "much"), ("0", "1"), ("inf", "1")):
        assert_refused(learn("run", *flags, *weights), "--class-weights", "2 numbers above 0")


@pytest.mark.parametrize("loss", ["bce", "bce-dice"])
def test_a_weight_says_how_often_the_pixels_of_a_class_count(loss):
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 2, 8, 8), (torch.rand(2, 2, 8, 8) > 0.7).float()
    weights = torch.tensor([1.0, 3.0]).view(-1, 1, 1)
    pixels = nn.functional.softplus(logits) - logits * masks
    more = (2 * pixels * masks)[:, 1].sum((1, 2)) / logits[0].numel()
    found = LOSSES[loss](logits, masks, weights)
    assert found.allclose(LOSSES[loss](logits, masks) + more)


def test_weights_for_other_classes_start_a_run_but_for_their_last_layer(learn, tmp_path, trained):
    weights = trained / "best_checkpoint.pth.tar"
    code, out, err = learn("run", *CLASSES, "--epochs", 1, "--lr", "1e-9", "--pretrained", weights)
    assert code == 0 and "start with random weights: final_conv.bias, final_conv.weight" in out, err
    before = utils.load_checkpoint(weights)["state_dict"]
    after = utils.load_checkpoint(tmp_path / "run" / "my_checkpoint.pth.tar")["state_dict"]
    name = "downs.0.conv.0.weight"
    assert after[name].allclose(before[name], atol=1e-5) and len(after["final_conv.bias"]) == 2
    refused = learn("run", "--load-model", "--classes", 3, "--epochs", 2)
    assert_refused(refused, "--classes", "start afresh")


def test_a_run_that_is_too_short_to_learn_says_so_and_what_to_try(learn):
    code, out, _ = learn("run", "--mask-value", 1, "--epochs", 1, "--lr", "1e-9")
    assert code == 0 and "Only 2 steps: --epochs 100" in out and "Only 7 photos" in out
    assert "Nothing was learned: marking everything has a Dice of 0." in out


# Crops and tiles


@pytest.mark.parametrize("height, width", [(32, 32), (33, 70), (100, 9), (20, 30)])
def test_tiles_of_any_photo_add_up_to_it(height, width):
    images, sizes = torch.rand(1, 2, height, width), set()

    def answer(tile):
        sizes.add(tile.shape[-2:])
        return tile * 3

    assert in_tiles(answer, images, 32).allclose(images * 3, atol=1e-5)
    assert sizes == {(min(height, 32), min(width, 32))}


def test_crops_are_of_the_photos_own_pixels_others_each_epoch_and_the_same_again(scenes):
    folders = scenes / "train_images", scenes / "train_masks"
    labels = Labels(2, (), 9)
    crops = get_loaders(*folders, None, None, 4, size=(32, 32), labels=labels, crop=32)
    photos, held_out = (loader.dataset for loader in crops)
    names = [pair.name for pair in photos.pairs]
    assert len(names) == 4 * len(set(names))  # 32x32 pixels cover 41x60 and the like in 2x2

    again = CarvanaDataset(None, None, photos.transform, pairs=photos.pairs, labels=labels, crop=32)
    images = [photos[epoch, index][0] for epoch in (1, 2) for index in range(4)]
    assert all(a.shape == (3, 32, 32) for a in images)
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert again[2, 3][0].equal(images[-1]), "without the cache"

    (whole, mask), photo = held_out[0], np.asarray(Image.open(held_out.pairs[0].photo))
    assert np.allclose(whole.permute(1, 2, 0) * 255, photo, atol=1e-4)
    assert mask.shape[1:] == photo.shape[:2]


def test_a_photo_smaller_than_a_crop_goes_on_mirrored(scenes):
    pairs = find_pairs(scenes / "train_images", scenes / "train_masks")
    image, mask = CarvanaDataset(None, None, pairs=pairs, labels=Labels(2, (), 9), crop=64)[0]
    assert image.shape == (3, 64, 64) and mask.shape == (2, 64, 64)
    assert image[:, 41].equal(image[:, 40]) and image[:, 43].equal(image[:, 38])


def test_a_run_on_crops_keeps_their_size_and_is_scored_on_whole_photos(
    learn, call, scenes, tmp_path
):
    photos, masks = scenes / "train_images", scenes / "train_masks"  # of several sizes
    held_out = "--val-img-dir", photos, "--val-mask-dir", masks
    code, out, err = learn("run", "--mask-value", 1, 2, "--crop", 32, "--epochs", 1, *held_out)
    assert code == 0 and "Crops of 32 pixels" in out, err
    checkpoint = utils.load_checkpoint(tmp_path / "run" / "my_checkpoint.pth.tar")
    assert checkpoint["crop"] == 32 and checkpoint["image_size"] == [32, 32]
    for flags in ([], ["--full-size"], ["--tta"]):
        shutil.rmtree(tmp_path / "scenes" / ".cache", ignore_errors=True)
        path = tmp_path / "scores.csv"
        code, _, err = call(
            evaluation.main, "--output-dir", tmp_path / "run", "--csv", path, *flags
        )
        assert code == 0, err
        scores = rows(tmp_path, "scores.csv")
        if not flags:
            first = scores
        assert flags == ["--tta"] or scores == first
    assert_refused(learn("small", "--crop", 4), "--crop", "need at least")


def test_the_cache_knows_labels_and_photos_of_their_own_sizes(scenes):
    pairs = find_pairs(scenes / "train_images", scenes / "train_masks")
    place = scenes / "train_images"
    caches = [Cache(pairs, None, 3, place, labels=Labels(2, (), 9)) for _ in range(2)]
    other = Cache(pairs, None, 3, place, labels=Labels(1, (1,), 9))
    assert caches[0].path == caches[1].path != other.path
    caches[0].build()
    assert caches[1].exists and not other.exists
    for pair in (pairs[3], pairs[0]):
        photo, mask = caches[1].read(pair)
        assert (photo == np.asarray(Image.open(pair.photo))).all()
        raw = np.asarray(Image.open(pair.mask))
        assert (mask == np.where(raw == 9, IGNORED, raw)).all()


def test_masks_of_classes_that_nobody_named_are_refused_with_what_is_in_them(learn, call, scenes):
    folders = ["--data-dir", scenes, *SMALL]
    refused = call(train.main, *folders)
    assert_refused(refused, "train_masks", "--classes", "--mask-value", "--ignore")


def test_a_photo_of_ignored_pixels_alone_counts_in_no_score(capsys):
    masks = torch.zeros(3, 1, 4, 4)
    masks[0, 0, :2] = 1
    masks[2] = -1
    logits = torch.where(masks > 0, 5.0, -5.0)
    logits[1] = 5
    loader = DataLoader(TensorDataset(logits, masks), batch_size=3)
    scores = check_accuracy(loader, nn.Identity(), "cpu")
    assert scores["dice"] == 0.5, "the mean of 1 and 0; the third photo does not count"
    assert "Got 16/32 with acc 50.00" in capsys.readouterr().out
    only_ignored = DataLoader(TensorDataset(logits[2:], masks[2:]))
    assert all(
        np.isfinite(score) for score in check_accuracy(only_ignored, nn.Identity(), "cpu").values()
    )


def test_held_out_photos_without_any_class_leave_a_run_that_resumes(learn, scenes, tmp_path):
    shutil.copytree(scenes / "train_images", scenes / "val_images")
    (scenes / "val_masks").mkdir()
    for path in (scenes / "train_masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 9, mask, 0)).save(scenes / "val_masks" / path.name)
    flags = *CLASSES, "--no-cache", "--epochs"
    code, _, err = learn("run", *flags, 2)
    if code == 2:  # "no mask has a pixel of an object" may refuse them, too
        assert "no mask has a pixel of an object" in err
        return
    assert all(np.isfinite(float(row["dice"])) for row in rows(tmp_path / "run"))
    code, _, err = learn("run", *flags, 3, "--load-model")
    assert code == 0, err


def test_the_loss_of_test_py_is_that_of_training_with_class_weights(learn, call, tmp_path):
    assert learn("run", *CLASSES, "--epochs", 1, "--class-weights", 1, 7)[0] == 0
    code, out, err = call(evaluation.main, "--output-dir", tmp_path / "run", "--device", "cpu")
    loss = float(rows(tmp_path / "run")[0]["val_loss"])
    assert code == 0 and f"loss {loss:.5f}, " in out, err
