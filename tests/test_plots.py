"""A run's numbers as files: metrics.csv, curves, histogram."""

import pytest
from conftest import rows
from PIL import Image

import test as evaluation
from support import plots

ROW = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.6, "dice": 0.8, "iou": 0.7, "accuracy": 0.9}
HISTORY = [ROW | {"learning_rate": 1e-3, "epoch": n, "dice": n / 4} for n in (1, 2, 3)]


@pytest.fixture
def quick_figures():
    """Draw real figures in this file, where other tests have empty ones."""


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_the_histogram_shows_all_photos(tmp_path):
    evaluation.save_histogram([0.9, 0.95, 0.99], tmp_path / "histogram.png")
    assert size_of(tmp_path / "histogram.png") == (600, 400)


def test_a_history_becomes_a_table_and_curves(tmp_path):
    plots.save_history(HISTORY, HISTORY[2], tmp_path)
    assert rows(tmp_path) == [{name: str(row[name]) for name in row} for row in HISTORY]
    assert size_of(tmp_path / "saved_images" / "training_curves.png") == (1400, 400)


def test_metrics_are_empty_where_a_row_lacks_a_column(tmp_path):
    plots.save_history([HISTORY[0] | {"threshold": 0.5}, *HISTORY[1:]], HISTORY[2], tmp_path)
    assert [row["threshold"] for row in rows(tmp_path)] == ["0.5", "", ""]


@pytest.mark.parametrize("rows_without", [1, 3])
@pytest.mark.parametrize("column", ["iou", "learning_rate"])
def test_curves_are_drawn_from_the_rows_that_have_a_column(tmp_path, column, rows_without):
    older = [{name: row[name] for name in row if name != column} for row in HISTORY]
    history = older[:rows_without] + HISTORY[rows_without:]
    plots.save_history(history, history[2], tmp_path)
    expected = [str(row.get(column, "")) for row in history]
    assert [row.get(column, "") for row in rows(tmp_path)] == expected
    assert size_of(tmp_path / "saved_images" / "training_curves.png") == (1400, 400)
