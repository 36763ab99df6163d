import pytest
from conftest import rows
from PIL import Image

import plots
import train


@pytest.fixture
def quick_figures():
    """The real figures, here."""


def test_the_histogram_shows_all_photos(tmp_path):
    plots.save_histogram([0.9, 0.95, 0.99], tmp_path / "histogram.png")
    with Image.open(tmp_path / "histogram.png") as picture:
        assert picture.size == (600, 400)


def test_curves_are_drawn(tmp_path):
    row = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.6, "dice": 0.8, "iou": 0.7}
    row |= {"accuracy": 0.9, "learning_rate": 1e-3}
    second = row | {"epoch": 2, "dice": 0.9}
    plots.save_curves([row, second], second, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1400, 400)


def read_events(folder):
    """(numbers: {name: {epoch: value}}, pictures: {name: epochs}), by TensorBoard's own reader."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {name: {e.step: e.value for e in events.Scalars(name)} for name in tags["scalars"]}
    return numbers, {name: [e.step for e in events.Images(name)] for name in tags["images"]}


def test_tensorboard_shows_the_numbers_of_metrics_csv_and_the_same_photos(fit, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    code, _, err = fit("run", "--epochs", 2, "--tensorboard")
    assert code == 0, err
    code, _, err = fit("run", "--load-model", "--epochs", 7, "--tensorboard")
    assert code == 0, err
    numbers, pictures = read_events(tmp_path / "run" / "runs")
    table = rows(tmp_path / "run")
    names = {"train_loss": "loss/train", "val_loss": "loss/validation"}
    for column in set(table[0]) - {"epoch"}:
        series = numbers[names.get(column, column)]
        assert series == {int(row["epoch"]): pytest.approx(float(row[column])) for row in table}
    panels = {path.stem.removeprefix("panel_") for path in tmp_path.glob("run/*/panel_*")}
    assert set(pictures) == panels and len(panels) > 0
    for epochs in pictures.values():  # the first, each fifth after it, and a run's last
        assert epochs == [1, 2, 6, 7]


def test_a_new_run_in_a_folder_of_events_is_shown_in_place_of_the_old_one(fit, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    for seed in (1, 2):
        fit("run", "--epochs", 1, "--seed", seed, "--tensorboard", tmp_path / "events")
    numbers, _ = read_events(tmp_path / "events")
    newest = float(rows(tmp_path / "run")[0]["val_loss"])
    assert numbers["loss/validation"] == {1: pytest.approx(newest)}
    assert len(list((tmp_path / "events").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_training(fit, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = fit("run", "--epochs", 1, "--tensorboard", tmp_path / "file" / "runs")
    assert code == 2 and "name another --tensorboard" in err and not (tmp_path / "run").exists()


def test_without_tensorboard_one_line_says_what_to_install(fit, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    code, _, err = fit("run", "--epochs", 1, "--tensorboard")
    assert code == 2 and "pip install tensorboard" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / train.CHECKPOINT).exists()
