"""A run's numbers as files: metrics.csv, curves, TensorBoard's events, a histogram."""

import csv
import io

import matplotlib.figure
import numpy as np

from files import BadInput, write_aside

PANELS_EVERY = 5  # epochs between two sets of TensorBoard's pictures


def save_metrics(history, path):
    """metrics.csv: one row an epoch, from the history that the checkpoint carries."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[-1]))
    writer.writeheader()
    writer.writerows(history)
    with write_aside(path) as file:
        file.write(text.getvalue().encode())


def save_curves(history, best, path):
    """training_curves.png: the losses, the scores and the learning rate over the epochs.

    `best` is one of the history's rows, or None, as before the first epoch on other photos ends.
    """
    epochs = [row["epoch"] for row in history]
    figure = matplotlib.figure.Figure(figsize=(14, 4), layout="constrained")
    plots = figure.subplots(1, 3)
    series = (("train_loss", "val_loss"), ("accuracy", "dice", "iou"), ("learning_rate",))
    for axes, names in zip(plots, series, strict=True):
        for name in names:
            label = name.replace("_", " ")
            axes.plot(epochs, [row[name] for row in history], marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    plots[0].set_title("loss")
    if best:
        plots[1].plot(best["epoch"], best["dice"], "o", color="black", mfc="none", ms=9)
        plots[1].set_title(f"validation: best Dice {best['dice']:.5f} after epoch {best['epoch']}")
    plots[2].set_title("learning rate at the epoch's end")
    save_figure(figure, path)


def save_histogram(dices, path):
    """How many photos have which Dice."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(dices, bins=40)
    axes.axvline(np.mean(dices), color="black", lw=1)
    axes.set_title(f"{len(dices)} photos, mean Dice {np.mean(dices):.5f}")
    axes.set_xlabel("Dice")
    axes.set_ylabel("photos")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure, path):
    with write_aside(path) as file:
        figure.savefig(file, format="png", dpi=100)


class Board:
    """A run as TensorBoard shows it: every number of metrics.csv, and panels now and then.

    The first thing added opens a new file of events in `folder`. TensorBoard shows it in place of
    what earlier files there have from its first epoch on: a resumed run continues its curves, a new
    one hides those of the old. Raises BadInput where TensorBoard is not installed.
    """

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput(
                "--tensorboard: needs a package more: pip install tensorboard, or leave it out"
            ) from None
        self.make_writer = lambda epoch: SummaryWriter(folder, purge_step=epoch)
        self.writer = None

    def add(self, row, panels, last):
        """An epoch's row of the history, and its panels, {photo's name: PIL image}."""
        self.writer = self.writer or self.make_writer(row["epoch"])
        groups = {"train_loss": "loss/train", "val_loss": "loss/validation"}
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(groups.get(name, name), value, row["epoch"])
        if last or row["epoch"] % PANELS_EVERY == 1:
            for name, panel in panels.items():
                picture = np.asarray(panel)
                self.writer.add_image(name, picture, row["epoch"], dataformats="HWC")
        self.writer.flush()
