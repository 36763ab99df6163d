"""A run's numbers as files: metrics.csv, curves, panels."""

import csv
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.writing import write_aside


def save_history(history, best, output):
    """metrics.csv, one row an epoch, and the curves, both from the history of a checkpoint."""
    save_csv(history, output / "metrics.csv")
    save_curves(history, best, output / "saved_images" / "training_curves.png")


def save_csv(rows, path):
    """Write rows, dicts, as a CSV file, whole or not at all."""
    text, columns = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    with write_aside(path) as file:
        file.write(os.fsencode(text.getvalue()))  # names of files may be no text


def save_curves(history, best, path):
    """training_curves.png: losses, scores and learning rate over the epochs; `best` is a row."""
    from matplotlib.figure import Figure  # not at the top: predict.py would wait for it

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(14, 4), layout="constrained")
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
    plots[1].plot(best["epoch"], best["dice"], "o", color="black", mfc="none", ms=9)
    plots[1].set_title(f"validation: best Dice {best['dice']:.5f} after epoch {best['epoch']}")
    plots[2].set_title("learning rate at the epoch's end")
    save_figure(figure, path)


def save_figure(figure, path):
    """Write a figure as PNG, whole or not at all."""
    with write_aside(path) as file:
        figure.savefig(file, format="png", dpi=100)


def palette(classes):
    """Colours of background, black, and of each class: (1 + classes, 3), uint8. A single one is
    white; several have those of Pascal VOC, whose bits come from the class's number."""
    if classes == 1:
        return np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    # The number's bits go to red, green, blue, red ..., the lowest to a channel's highest.
    bits = np.arange(classes + 1)[:, None, None] >> np.arange(9).reshape(3, 3).T & 1
    return np.packbits(bits, axis=2)[..., 0]


def draw_panel(caption, photo, true, predicted, colours):
    """A PIL image: photo | true mask | predicted mask | where they differ, under a caption.

    Args:
        photo (H, W, 1 or 3), uint8; true and predicted (H, W), 0 for background, else a class.
        colours (1 + classes, 3), uint8: see palette.

    In the last picture missed pixels are red, others that are wrong blue.
    """
    photo = np.broadcast_to(photo, (*photo.shape[:2], 3))
    differ = np.repeat(photo.mean(axis=2, keepdims=True) * 0.5, 3, axis=2).astype(np.uint8)
    differ[(predicted != true) & (predicted == 0)] = (230, 60, 50)
    differ[(predicted != true) & (predicted > 0)] = (60, 130, 255)
    tiles = np.concatenate([photo, colours[true], colours[predicted], differ], axis=1)

    width = photo.shape[1]
    font = ImageFont.load_default(max(9, width // 20))
    line = int(font.size * 1.6)
    panel = Image.new("RGB", (tiles.shape[1], tiles.shape[0] + 2 * line), "white")
    panel.paste(Image.fromarray(tiles), (0, 2 * line))
    draw = ImageDraw.Draw(panel)
    draw.text((4, line * 0.15), caption, "black", font)
    titles = ("photo", "true mask", "prediction", "red: missed, blue: too much")
    for column, title in enumerate(titles):
        draw.text((column * width + 4, line * 1.15), title, "gray", font)
    return panel
