"""Files that a stranger could send: flipped bits, cut off, pieces of one in another.

    python -m pytest tests/test_fuzz.py                 some hundreds
    python -m pytest tests/test_fuzz.py -m torture -s   more than 10,000, with figures

Each is read, or refused with BadInput; never another exception, a crash, a hang (SECONDS), much
memory (MEGABYTES) or a file outside the folder that was asked for. All of a kind are read in one
process of its own, so that a crash of the interpreter fails the test and leaves the input behind.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_pair, write_pairs

import predict
from checkpoints import build_model, load_checkpoint
from data import prepare
from dataset import CarvanaDataset
from files import BadInput
from model import UNet

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis: requirements-extra.txt")
st = hypothesis.strategies

SECONDS = 10  # for one input, on a machine that does other things too
MEGABYTES = 1200  # that the process may grow by at its peak; a photo may have 250 megapixels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's figures of memory")


# Mutation


@st.composite
def mutated(draw, valid):
    """One of the valid files' bytes with up to four injuries."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.integers(0, 3)) == 0:  # the head and the tail of a file say most about it
            place = draw(st.sampled_from([place % 64, max(0, len(content) - 1 - place % 64)]))
        kind = draw(st.sampled_from(["flip", "set", "cut", "splice", "repeat", "remove"]))
        if kind == "flip" and content:
            content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            value = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            content[place : place + draw(st.integers(1, 8))] = [value] * draw(st.integers(1, 8))
        elif kind == "cut":
            del content[place:]
        elif kind == "splice":
            other = draw(st.sampled_from(valid))
            start = draw(st.integers(0, len(other)))
            length = draw(st.integers(1, 4096))
            content[place : place + length] = other[start : start + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 256))]
        else:
            del content[place : place + draw(st.integers(1, 256))]
    return bytes(content)


# What reads them; each takes the bytes and an empty folder, and gives whether they were taken


def photo_in_a_dataset(content, folder, kind):
    images, masks = folder / "images", folder / "masks"
    images.mkdir(), masks.mkdir()
    (images / f"a.{kind}").write_bytes(content)
    draw_pair(np.random.default_rng(0), (72, 48))[1].save(masks / "a_mask.gif")
    image, mask = CarvanaDataset(images, masks, size=(32, 48))[0]
    assert image.shape == (3, 32, 48) and mask.shape == (1, 32, 48)


def mask_in_a_dataset(content, folder, kind):
    images, masks = folder / "images", folder / "masks"
    images.mkdir(), masks.mkdir()
    draw_pair(np.random.default_rng(0), (72, 48))[0].save(images / "a.png")
    (masks / f"a_mask.{kind}").write_bytes(content)
    _, mask = CarvanaDataset(images, masks, size=(32, 48))[0]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def photo_in_predict(content, folder, kind):
    photo = folder / f"photo.{kind}"
    photo.write_bytes(content)
    flags = "--cutout --device cpu --image-height 32 --image-width 48 --overwrite".split()
    net = folder.parent / "net.pth.tar"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
        io.StringIO()
    ) as err:
        code = predict.main(
            [str(photo), "--checkpoint", str(net), "--output", str(folder / "out"), *flags]
        )
    if code:
        raise BadInput(err.getvalue())
    assert len(list((folder / "out").iterdir())) == 2


def zips_in_prepare(content, folder, kind):
    source = folder / "source"
    source.mkdir()
    other = "train_masks" if kind == "train" else "train"
    (source / f"{kind}.zip").write_bytes(content)
    (source / f"{other}.zip").symlink_to(folder.parent / "zips" / f"{other}.zip")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.prepare_carvana(source, folder / "data")
    written = {path.suffix for path in (folder / "data").rglob("*") if path.is_file()}
    assert written == {".jpg", ".gif"}


def checkpoint(content, folder, kind):
    path = folder / "net.pth.tar"
    path.write_bytes(content)
    loaded = load_checkpoint(path)
    with torch.inference_mode():
        logits = build_model(loaded, path, torch.device("cpu"))(torch.zeros(1, 3, 16, 24))
    assert logits.shape == (1, 1, 16, 24)


READERS = {
    "jpg": (photo_in_a_dataset, mask_in_a_dataset, photo_in_predict),
    "png": (photo_in_a_dataset, mask_in_a_dataset, photo_in_predict),
    "gif": (photo_in_a_dataset, mask_in_a_dataset, photo_in_predict),
    "train": (zips_in_prepare,),
    "train_masks": (zips_in_prepare,),
    "checkpoint": (checkpoint,),
}


def valid_files(kind, folder):
    """The bytes of a few valid files of a kind."""
    if kind in ("train", "train_masks"):
        return [(folder / "zips" / f"{kind}.zip").read_bytes()]
    if kind == "checkpoint":
        return [path.read_bytes() for path in folder.glob("*.tar")]
    files = []
    for seed in range(3):
        photo, mask = draw_pair(np.random.default_rng(seed), (72, 48))
        for image in (photo, mask, photo.quantize(16), mask.convert("1")):
            file = io.BytesIO()
            if kind == "jpg":
                image = image.convert(
                    "RGB" if image.mode == "P" else "L" if image.mode == "1" else image.mode
                )
            image.save(file, {"jpg": "JPEG", "png": "PNG", "gif": "GIF"}[kind])
            files.append(file.getvalue())
    return files


def furnish(folder):
    """What the readers need beside the file itself."""
    torch.manual_seed(0)
    for features in ((4,), (4, 8)):
        model = UNet(features=features)
        optimizer = torch.optim.Adam(model.parameters())
        state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        name = "net.pth.tar" if len(features) == 1 else "two.pth.tar"
        state |= {"image_size": [32, 48], "threshold": 0.5, "history": [], "epoch": 0}
        torch.save(state, folder / name)
    images, masks = write_pairs(folder / "drawn", cars=2, views=2, size=(48, 32))
    (folder / "zips").mkdir()
    for name, pictures in (("train", images), ("train_masks", masks)):
        with zipfile.ZipFile(folder / "zips" / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(pictures.iterdir()):
                archive.write(path, f"{name}/{path.name}")


def read_all(kind, count, folder, results):
    """Read `count` mutated files of a kind; in a process of its own."""
    torch.set_num_threads(1)
    done, peaks = Counter(), []
    folder = Path(folder)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    valid, readers = valid_files(kind, folder), READERS[kind]
    for reader in readers:  # what is valid is taken, which also loads all that is loaded late
        for number, content in enumerate(valid[:1] if reader is mask_in_a_dataset else valid):
            place = folder / f"valid{number}{reader.__name__}"
            place.mkdir()
            with contextlib.suppress(BadInput):  # sizes that differ, colours in a mask
                reader(content, place, kind)
                done["valid"] += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outside = sorted(os.listdir(folder))

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(mutated(valid), st.sampled_from(readers))
    def read(content, reader):
        place = folder / "input"
        shutil.rmtree(place, ignore_errors=True)  # of one that failed, and is tried again
        place.mkdir()
        (folder / "last input").write_bytes(content)
        begin = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            reader(content, place, kind)
            done["read"] += 1
        except BadInput as problem:
            assert str(problem).strip()
            done["refused"] += 1
        signal.alarm(0)
        peaks.append(time.perf_counter() - begin)
        (folder / "last input").unlink()
        shutil.rmtree(place)
        assert sorted(os.listdir(folder)) == outside, "a file outside its folder"

    read()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results.put(dict(done) | {"slowest, s": round(max(peaks), 2), "memory, MiB": round(grown)})


def fuzz(forkserver, kind, count, tmp_path):
    """Figures of so many mutated files of a kind; fails where one does harm."""
    furnish(tmp_path)
    results = forkserver.Queue()
    process = forkserver.Process(target=read_all, args=(kind, count, str(tmp_path), results))
    process.start()
    process.join()
    last = tmp_path / "last input"
    assert process.exitcode == 0, f"exit code {process.exitcode} on {last}" if last.exists() else ""
    figures = results.get(timeout=10)
    results.close()
    assert figures["memory, MiB"] < MEGABYTES, figures
    return figures


KINDS = {
    "jpg": 3000,
    "png": 3000,
    "gif": 3000,
    "train": 600,
    "train_masks": 600,
    "checkpoint": 3000,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused(forkserver, kind, tmp_path):
    figures = fuzz(forkserver, kind, 60, tmp_path)
    assert figures.get("refused", 0) > 0 and figures["valid"] > 0


@pytest.mark.torture
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutated_files_are_read_or_refused(forkserver, kind, tmp_path):
    print(f"\n{kind}: {fuzz(forkserver, kind, KINDS[kind], tmp_path)}")
