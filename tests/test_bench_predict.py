import numpy as np
import pytest

import bench_predict
from submission import encode


def test_every_row_is_measured(call, photos, network, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in requirements-extra.txt")
    monkeypatch.setattr(bench_predict, "REPEATS", 1)
    flags = "--checkpoint", network, "--count", 20, "--device", "cpu"
    code, out, err = call(bench_predict.main, photos, *flags)
    assert code == 0, err
    for row in ("reading and writing", "network", "network by onnxruntime", "end to end"):
        found = [line.split()[-1] for line in out.splitlines() if line.startswith(row + ", photos")]
        assert float(found[0]) > 0, row
    assert "memory, last quarter over the first" in out or not bench_predict.resident_memory()


def test_the_loop_that_the_encoder_is_compared_with_gives_the_same():
    mask = np.random.default_rng(0).random((20, 30)) > 0.5
    assert bench_predict.encode_by_loop(mask) == encode(mask)
