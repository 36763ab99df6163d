"""A run's numbers as files: metrics.csv, its curves, panels of photos and masks."""

import csv
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.writing import write_aside


def save_history(history, best, output):
    """Write metrics.csv, one row per epoch, and saved_images/training_curves.png.

    Args:
        history: a dict for each epoch, {column: value}; older rows may lack newer columns.
        best: the row of the best epoch.
        output: the run's folder, a Path.
    """
    save_csv(history, output / "metrics.csv")
    save_curves(history, best, output / "saved_images" / "training_curves.png")


def save_csv(rows, path):
    """Write rows, dicts {column: value}, as a CSV file, complete or not at all.

    Values that a row lacks are left empty.
    """
    columns = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    with write_aside(path) as file:
        file.write(os.fsencode(text.getvalue()))  # file names need not be valid Unicode


def save_curves(history, best, path):
    """Plot losses, scores and learning rate over the epochs; arguments as in save_history."""
    from matplotlib.figure import Figure  # here, since predict.py would wait for it at its start

    figure = Figure(figsize=(14, 4), layout="constrained")
    losses, scores, rates = figure.subplots(1, 3)
    plot_columns(losses, history, ["train_loss", "val_loss"])
    losses.set_title("loss")
    plot_columns(scores, history, ["accuracy", "dice", "iou"])
    scores.plot(best["epoch"], best["dice"], "o", color="black", mfc="none", ms=9)
    scores.set_title(f"validation: best Dice {best['dice']:.5f} after epoch {best['epoch']}")
    plot_columns(rates, history, ["learning_rate"])
    rates.set_title("learning rate at the end of each epoch")
    save_figure(figure, path)


def save_histogram(dices, path):
    """How many photos have which Dice, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(dices, bins=40)
    title = f"{len(dices)} photos, mean Dice {np.mean(dices):.5f}"
    axes.set(title=title, xlabel="Dice", ylabel="photos")
    save_figure(figure, path)


def plot_columns(axes, history, columns):
    """Plot columns over the epochs; a row that lacks one leaves a gap."""
    epochs = [row["epoch"] for row in history]
    for column in columns:
        values = [row.get(column, np.nan) for row in history]
        axes.plot(epochs, values, marker=".", label=column.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def save_figure(figure, path):
    """Write a figure as PNG, complete or not at all."""
    with write_aside(path) as file:
        figure.savefig(file, format="png", dpi=100)


def palette(classes):
    """Colours of the background, which is black, and of each class: (1 + classes, 3), uint8.

    A single class is white; several have the colours of Pascal VOC.
    """
    if classes == 1:
        return np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    # Pascal VOC deals the bits of a class's number, lowest first, to red, green, blue, red, ...,
    # and fills each channel from its highest bit down.
    bits = np.arange(classes + 1)[:, None, None] >> np.arange(9).reshape(3, 3).T & 1
    return np.packbits(bits, axis=2)[..., 0]


def draw_panel(caption, photo, true, predicted, colours):
    """Draw photo, true mask, predicted mask and their differences side by side under a caption.

    In the picture of the differences missed pixels are red, other wrong pixels blue.

    Args:
        caption: a line of text.
        photo: (H, W, 1 or 3), uint8.
        true: (H, W), the class of each pixel, 0 for background.
        predicted: likewise.
        colours: (1 + classes, 3), uint8, see palette.

    Returns:
        An RGB image.
    """
    photo = np.broadcast_to(photo, (*photo.shape[:2], 3))
    differences = np.repeat(photo.mean(axis=2, keepdims=True) * 0.5, 3, axis=2).astype(np.uint8)
    differences[(predicted != true) & (predicted == 0)] = (230, 60, 50)
    differences[(predicted != true) & (predicted > 0)] = (60, 130, 255)
    tiles = np.concatenate([photo, colours[true], colours[predicted], differences], axis=1)

    width = photo.shape[1]
    font = ImageFont.load_default(max(9, width // 20))
    line_height = int(font.size * 1.6)
    panel = Image.new("RGB", (tiles.shape[1], tiles.shape[0] + 2 * line_height), "white")
    panel.paste(Image.fromarray(tiles), (0, 2 * line_height))
    draw = ImageDraw.Draw(panel)
    draw.text((4, line_height * 0.15), caption, "black", font)
    titles = ("photo", "true mask", "prediction", "red: missed, blue: too much")
    for column, title in enumerate(titles):
        draw.text((column * width + 4, line_height * 1.15), title, "gray", font)
    return panel
