"""Files that a stranger could send: flipped bits, cut off, pieces of one in another.

python -m pytest tests/test_fuzz.py -m slow          some hundreds
python -m pytest tests/test_fuzz.py -m torture -s    more than 10,000, with figures

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
from itertools import product

import numpy as np
import pytest
import torch
from conftest import draw_pair

import predict
import train
from data import prepare
from dataset import CarvanaDataset
from support.checkpoints import unpack
from support.errors import BadInput
from utils import build_model, load_checkpoint

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis: requirements-extra.txt")
st = hypothesis.strategies

SECONDS = 10  # for one input, on a machine that does other things too
MEGABYTES = 1200  # that the process may grow by at its peak; a photo may have 250 megapixels
PHOTO, MASK = draw_pair(np.random.default_rng(0), (72, 48))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's figures of memory")


@st.composite
def mutated(draw, valid):
    """One of the valid files' bytes with up to four injuries."""
    some = st.sampled_from(valid)
    content = bytearray(draw(some))
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, len(content) - 1)
        place = draw(st.integers(0, last))
        if draw(st.integers(0, 3)) == 0:  # the head and the tail of a file say most about it
            place = draw(st.sampled_from([place % 64, max(0, last - place % 64)]))
        length, bit, other = draw(st.integers(1, 256)), draw(st.integers(0, 7)), draw(some)
        start, old = draw(st.integers(0, len(other))), content[place : place + length]
        ways = [
            (old[:1], bytes(byte ^ 1 << bit for byte in old[:1])),
            (old[:8], b"\0\1\x7f\x80\xff"[bit % 5 :][:1] * (length % 8)),
            (old, other[start : start + 16 * length]),  # a piece of another file
            (old, old + old),
            (old, b""),
            (content[place:], b""),  # cut off
        ]
        old, new = draw(st.sampled_from(ways))
        content[place : place + len(old)] = new
    return bytes(content)


def as_photo(content, folder, kind):
    (folder / f"a.{kind}").write_bytes(content)
    MASK.save(folder / "a_mask.gif")
    image, mask = CarvanaDataset(folder, folder, size=(32, 48))[0]
    assert image.shape == (3, 32, 48) and mask.shape == (1, 32, 48)


def as_mask(content, folder, kind):
    PHOTO.save(folder / "a.png")
    (folder / f"a_mask.{kind}").write_bytes(content)
    _, mask = CarvanaDataset(folder, folder, size=(32, 48))[0]
    assert 0 <= mask.min() <= mask.max() <= 1


def by_predict(content, folder, kind):
    photo, output = folder / f"photo.{kind}", folder / "out"
    photo.write_bytes(content)
    net = folder.parent / "furnished" / "net.tar"
    flags = f"--checkpoint {net} --output {output} --cutout --device cpu".split()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        if predict.main([str(photo), *flags]):
            raise BadInput(photo, err.getvalue())
    assert len(list(output.iterdir())) == 2


def by_prepare(content, folder, kind):
    shutil.copytree(folder.parent / "furnished" / "zips", folder / "zips")
    (folder / "zips" / f"{kind}.zip").write_bytes(content)
    prepare.prepare_carvana(folder / "zips", folder / "data")
    assert {path.suffix for path in (folder / "data").rglob("*_*.*")} == {".jpg", ".gif"}


def as_checkpoint(content, folder, kind):
    path = folder / "net.pth.tar"
    path.write_bytes(content)
    checkpoint = load_checkpoint(path)
    with torch.inference_mode():
        assert build_model(checkpoint)(torch.zeros(1, 3, 16, 24)).shape == (1, 1, 16, 24)
    run = train.make_run(train.Settings(features=(4, 8)), torch.device("cpu"))
    unpack(checkpoint, run, path)


KINDS = {  # how many in the long version, the valid files, what takes their bytes
    "jpg": (3000, "*.jpg", as_photo, as_mask, by_predict),
    "png": (3000, "*.png", as_photo, as_mask, by_predict),
    "gif": (3000, "*.gif", as_photo, as_mask, by_predict),
    "train": (600, "zips/train.zip", by_prepare),
    "train_masks": (600, "zips/train_masks.zip", by_prepare),
    "checkpoint": (3000, "*.tar", as_checkpoint),
}


@pytest.fixture
def furnished(trained, tmp_path):
    """A folder in which `furnished` holds valid files: pictures, zip files, checkpoints."""
    folder = tmp_path / "furnished"
    os.makedirs(folder / "zips")
    checkpoint = torch.load(trained / "my_checkpoint.pth.tar", weights_only=True)
    torch.save(checkpoint, folder / "own.tar")
    torch.save({name: checkpoint[name] for name in ("state_dict", "optimizer")}, folder / "net.tar")
    for name, pictures in (("train", "train_images"), ("train_masks", "train_masks")):
        with zipfile.ZipFile(folder / "zips" / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((trained.parent / "data" / pictures).iterdir()):
                archive.write(path, f"{name}/{path.name}")
    pictures = PHOTO, MASK, PHOTO.convert("L"), MASK.convert("RGB")
    for (number, image), kind in product(enumerate(pictures), ("jpg", "png", "gif")):
        image.save(folder / f"{number}.{kind}")
    return tmp_path


def read_all(kind, count, folder, results):
    """Read `count` mutated files of a kind; in a process of its own."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    sys.stdout = io.StringIO()
    place, done, times = folder / "input", Counter(), []

    def read(content, reader):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (folder / "last input").write_bytes(content)
        signal.alarm(SECONDS)
        begin = time.perf_counter()
        try:
            reader(content, place, kind)
            done["read"] += 1
        except BadInput as problem:
            assert str(problem).strip()
            done["refused"] += 1
        signal.alarm(0)
        times.append(time.perf_counter() - begin)
        assert set(os.listdir(folder)) == {"furnished", "input", "last input"}, "a file outside"

    _, pattern, *readers = KINDS[kind]
    valid = [path.read_bytes() for path in sorted((folder / "furnished").glob(pattern))]
    for reader in readers:  # also loads all that is loaded late
        for content in valid:
            read(content, reader)
    assert done.pop("read") > 0, "not one of the valid files"
    done.clear(), times.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    given = hypothesis.given(mutated(valid), st.sampled_from(readers))(read)
    how = {"suppress_health_check": list(hypothesis.HealthCheck), "deadline": None}
    how |= {"phases": [hypothesis.Phase.generate], "derandomize": True, "database": None}
    hypothesis.settings(max_examples=count, **how)(given)()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results.put(dict(done) | {"slowest, s": round(max(times), 2), "memory, MiB": round(grown)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "long", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.torture)]
)
def test_a_mutated_file_is_read_or_refused(forkserver, furnished, kind, long):
    results, count = forkserver.Queue(), KINDS[kind][0] if long else 60
    process = forkserver.Process(target=read_all, args=(kind, count, furnished, results))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode} on {furnished / 'last input'}"
    figures = results.get(timeout=10)
    print(f"\n{kind}: {figures}")
    assert figures["refused"] > 0 and figures["memory, MiB"] < MEGABYTES
