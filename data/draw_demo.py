"""Draw the demo set: cars in a studio, each from 16 sides, with exact masks.

A car is a heap of coloured polygons in space, drawn in perspective from far to near; its mask is
drawn with the same polygons. Names, formats and folders are those of the Carvana challenge.
"""

import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from support.errors import BadInput, display_path
from support.progress import ProgressBar
from support.settings import FOLDERS
from support.signals import init_worker

CARS, VAL_CARS, VIEWS = 36, 4, 16
WIDTH, HEIGHT = 480, 320  # of a photo, in pixels
SMOOTH = 2  # drawn so many times larger, then averaged

# fmt: off
# Outlines, from the rear (x = 0) to the front (x = 1), z from the ground (0) to the roof (1): x and
# z of the lower body's upper edge, then the cabin's rear foot, rear top, front top and front foot,
# and the roof's height in metres.
BODIES = {
    "sedan": ([0, .02, .2, .7, .95, 1], [.5, .6, .64, .6, .5, .4], (.13, .3, .55, .75), 1.45),
    "hatchback": ([0, .01, .2, .72, .95, 1], [.5, .6, .63, .58, .5, .4], (.02, .12, .56, .78), 1.5),
    "coupe": ([0, .02, .2, .66, .94, 1], [.55, .66, .68, .6, .48, .36], (.08, .36, .52, .72), 1.3),
    "suv": ([0, .01, .2, .74, .97, 1], [.45, .58, .6, .58, .52, .4], (.01, .06, .6, .76), 1.75),
    "van": ([0, .01, .2, .84, .98, 1], [.4, .5, .52, .5, .42, .34], (.005, .02, .7, .9), 2.0),
    "pickup": ([0, .01, .3, .74, .97, 1], [.5, .56, .56, .58, .52, .4], (.36, .4, .58, .73), 1.75),
}
PAINTS = ["#c81e23", "#193c96", "#ebebeb", "#1e1e22", "#969ba0", "#145f46", "#dc961e", "#5a283c",
          "#cdc3aa", "#3c82be"]
# fmt: on
GLASS, TYRE, RIM, PLASTIC, PLATE = "#2d3741", "#1c1c1e", "#aaacb0", "#28282c", "#ebebe1"
HEADLIGHT, TAILLIGHT = "#f5f0d7", "#be1419"
WORDS = ["MOTORS", "AUTO", "GARAGE 24", "DRIVE", "CAR STUDIO", "TURNTABLE", "USED CARS", "PARK"]
LIGHT = np.array([0.35, -0.5, 0.79])  # direction to the lamp, length 1

# Settings with which a laptop without a GPU is through in minutes.
SETTINGS = {
    "recipe": "better",
    "image_height": 96,
    "image_width": 144,
    "features": (8, 16, 32, 64, 96),
    "batch_size": 4,
    "num_epochs": 6,
}


def use_demo(folder):
    """Settings of a training on the demo set, which is drawn first if it is not there."""
    if not folder.exists():
        print(f"No photos in data/: drawing a demo set into {display_path(folder)}", flush=True)
        try:
            make_demo(folder)
        except OSError as error:
            remedy = "free some space, or name photos of your own with --data-dir"
            raise BadInput(folder, f"cannot be drawn ({error.strerror})", remedy) from None
    return SETTINGS | {name: f"data/{folder.name}/{path}" for name, path in FOLDERS.items()}


def make_demo(folder):
    """Draw CARS cars into train_images, train_masks, val_images and val_masks under `folder`.

    The same on every machine, but for what JPEG encoders differ in. Built aside and renamed.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    jobs = [(number, aside) for number in range(CARS)]
    with ProcessPoolExecutor(initializer=init_worker, initargs=(None,)) as pool:
        for _ in ProgressBar(pool.map(draw_car, jobs), "drawing", CARS, unit=" cars"):
            pass
    os.replace(aside, folder)


def draw_car(job):
    """Write all views of one car; job: (its number, the folder of the four folders, made here)."""
    number, folder = job
    rng = np.random.default_rng([2018, number])
    side = "val" if number >= CARS - VAL_CARS else "train"
    images, masks = folder / f"{side}_images", folder / f"{side}_masks"
    for path in (images, masks):
        path.mkdir(parents=True, exist_ok=True)
    car, studio = Car(rng), Studio(rng)
    car_id = rng.bytes(6).hex()
    for view in range(1, VIEWS + 1):
        photo, mask = draw_photo(car, studio, 2 * math.pi * (view - 0.7) / VIEWS, rng)
        photo.save(images / f"{car_id}_{view:02d}.jpg", quality=88)
        mask.save(masks / f"{car_id}_{view:02d}_mask.gif")


class Car:
    """One car: faces, polygons of the solid, and details, flat things on them.

    Each is (points (n, 3) in metres: x to the front, y to the left, z up; colour; normal).
    """

    def __init__(self, rng):
        kind = rng.choice(list(BODIES))
        self.outline_x, self.outline_z, cabin, height = BODIES[kind]
        self.size = np.array([rng.uniform(3.7, 4.9), rng.uniform(0.82, 0.97), height])
        self.size *= rng.uniform(0.95, 1.05)  # length, half the width, height
        self.paint = PAINTS[rng.integers(len(PAINTS))]
        self.wheel = rng.uniform(0.29, 0.36) * (1.15 if height > 1.7 else 1)  # its radius
        self.axles = rng.uniform(0.17, 0.21), rng.uniform(0.79, 0.83)
        self.spokes = int(rng.integers(5, 11))
        self.faces, self.details, self.wheels = [], [], []
        self.add_body()
        self.add_cabin(*cabin)
        self.add_wheels()

    def face(self, points, colour=None, of=None):
        """Add a polygon, its points as shares of length (0 to 1), half width (-1 to 1), height."""
        points = (np.array(points, float) - (0.5, 0, 0)) * (self.size[0], *self.size[1:])
        normal = np.cross(points[1] - points[0], points[2] - points[0])
        normal /= np.linalg.norm(normal)
        if normal @ (points.mean(0) - (0, 0, 0.4 * self.size[2])) < 0:
            normal = -normal
        (self.faces if of is None else of).append((points, colour or self.paint, normal))

    def detail(self, points, colour):
        self.face(points, colour, self.details)

    def both_sides(self, add, points, *colour):
        """Add a polygon on the left and its mirror image on the right."""
        for side in (-1, 1):
            add([(x, side * y, z) for x, y, z in points], *colour)

    def belt(self, x):
        """Height of the lower body's upper edge."""
        return np.interp(x, self.outline_x, self.outline_z)

    def add_body(self):
        floor = 0.62 * self.wheel / self.size[2]
        sill = floor + 0.09
        xs = np.union1d(self.outline_x, np.linspace(0, 1, 11))
        ys = 1 - 0.16 * np.abs(2 * xs - 1) ** 6  # rounded towards both ends
        zs = self.belt(xs)
        for a, b, ya, yb, za, zb in zip(xs, xs[1:], ys, ys[1:], zs, zs[1:], strict=False):
            low = [(a, ya, floor), (b, yb, floor), (b, yb, sill), (a, ya, sill)]
            self.both_sides(self.face, low, PLASTIC)
            self.both_sides(self.face, [(a, ya, sill), (b, yb, sill), (b, yb, zb), (a, ya, za)])
            self.face([(a, -ya, za), (b, -yb, zb), (b, yb, zb), (a, ya, za)])
        for x, lamp in ((0, TAILLIGHT), (1, HEADLIGHT)):
            y, top = ys[0], self.belt(x)
            self.face([(x, -y, floor), (x, y, floor), (x, y, top), (x, -y, top)])
            self.detail([(x, -y, floor), (x, y, floor), (x, y, sill), (x, -y, sill)], PLASTIC)
            rim = sill + 0.07
            self.detail([(x, -0.28, sill), (x, 0.28, sill), (x, 0.28, rim), (x, -0.28, rim)], PLATE)
            low, high = top - 0.13, top - 0.03
            corners = [(x, y, low), (x, 0.5, low), (x, 0.56, high), (x, y, high)]
            self.both_sides(self.detail, corners, lamp)

    def add_cabin(self, x0, x1, x2, x3):
        """x of the rear foot, rear top, front top and front foot."""
        foot, top, pillar = 0.93, 0.72, 0.03
        a, d = self.belt(x0) - 0.02, self.belt(x3) - 0.02
        self.cabin_start = len(self.faces)
        self.both_sides(self.face, [(x0, foot, a), (x3, foot, d), (x2, top, 1), (x1, top, 1)])
        self.face([(x1, -top, 1), (x2, -top, 1), (x2, top, 1), (x1, top, 1)])
        for low_x, low_z, high_x in ((x0, a, x1), (x3, d, x2)):  # rear window, windscreen

            def pane(up, across, low_x=low_x, low_z=low_z, high_x=high_x):
                half = foot + up * (top - foot)
                return low_x + up * (high_x - low_x), across * half, low_z + up * (1 - low_z)

            self.face([pane(0, -1), pane(0, 1), pane(1, 1), pane(1, -1)])
            glass = [pane(0.1, -0.88), pane(0.1, 0.88), pane(0.92, 0.88), pane(0.92, -0.88)]
            self.detail(glass, GLASS)

        def side(x_share, z_share):  # a point on the cabin's side
            rear, front = x0 + z_share * (x1 - x0), x3 + z_share * (x2 - x3)
            z = (1 - z_share) * (a + x_share * (d - a)) + z_share
            return rear + x_share * (front - rear), foot + z_share * (top - foot), z

        middle = 0.5 if x1 < 0.35 else 0.2
        for start, end in ((0.06, middle - pillar), (middle + pillar, 0.93)):
            window = [side(start, 0.14), side(end, 0.14), side(end, 0.88), side(start, 0.88)]
            self.both_sides(self.detail, window, GLASS)
        x, y, z = side(0.95, 0.12)
        mirror = [(x, y, z), (x, y + 0.2, z), (x, y + 0.2, z + 0.09), (x, y, z + 0.09)]
        self.both_sides(self.face, mirror, PLASTIC)

    def add_wheels(self):
        turn = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        ring = np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1)
        for axle in self.axles:
            for side in (-1, 1):
                centre = np.array([(axle - 0.5) * self.size[0], side * self.size[1], self.wheel])
                out = np.array([0, side, 0])
                inside = centre - 0.2 * out
                discs = [(c + self.wheel * ring, TYRE, out) for c in np.linspace(inside, centre, 5)]
                discs.append((centre + 0.68 * self.wheel * ring, RIM, out))
                for spoke in range(self.spokes):
                    angle = 2 * math.pi * (spoke + np.array([0.2, 0.5, 0.8])) / self.spokes
                    tip = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], 1) * 0.6 * self.wheel
                    discs.append((np.vstack([centre + 0.2 * tip[1], centre + tip]), PLASTIC, out))
                self.wheels.append((side, discs))


class Studio:
    """The room: wall, floor, lettering, the same for all photos of a car."""

    def __init__(self, rng):
        base = rng.uniform(150, 235)
        self.wall = (base + rng.uniform(-12, 12, 3)).astype(np.float32)
        self.floor = (base * rng.uniform(0.7, 1.02) + rng.uniform(-12, 12, 3)).astype(np.float32)
        self.word = WORDS[rng.integers(len(WORDS))]
        self.ink = tuple(int(c) for c in self.wall * rng.uniform(0.25, 0.85))
        self.font_size = int(rng.uniform(40, 75))
        self.word_at = rng.uniform(0.02, 0.5), rng.uniform(0.04, 0.22)
        self.posters = [
            (*rng.uniform((0, 0.05, 0.05), (0.9, 0.3, 0.16)), PAINTS[rng.integers(len(PAINTS))])
            for _ in range(rng.integers(0, 3))
        ]  # left, top, size as shares of the width or height

    def draw(self, width, height, horizon):
        rows = np.arange(height, dtype=np.float32)[:, None, None]
        blend = 1 / (1 + np.exp(-(rows - horizon) / (0.012 * height)))
        lamp = 1 - 0.2 * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] ** 2
        room = (self.wall * (1 - blend) + self.floor * blend) * lamp * (1 - 0.12 * rows / height)
        image = Image.fromarray(room.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for x, y, size, colour in self.posters:
            left, top = x * width, y * height
            draw.rectangle((left, top, left + size * width, top + 1.2 * size * width), colour)
        font = ImageFont.load_default(self.font_size * width // WIDTH)
        draw.text((self.word_at[0] * width, self.word_at[1] * height), self.word, self.ink, font)
        return image


def draw_photo(car, studio, angle, rng):
    """One view: (photo, RGB; mask, palette image of 0 and 1)."""
    width, height = WIDTH * SMOOTH, HEIGHT * SMOOTH
    distance, eye = rng.uniform(7.5, 9), rng.uniform(1.3, 2.2)
    camera = np.array([distance * math.cos(angle), distance * math.sin(angle), eye])
    forward = np.array([0, 0, 0.65]) - camera
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    centre = width * rng.uniform(0.47, 0.53), height * rng.uniform(0.52, 0.6)
    zoom = width * rng.uniform(1.15, 1.4)

    def project(points):
        seen = points - camera
        depth = seen @ forward
        x, y = (zoom * (seen @ axis) / depth for axis in (right, up))
        return list(zip(centre[0] + x, centre[1] - y, strict=True))

    photo = studio.draw(width, height, horizon=centre[1] - 0.06 * height)
    mask = Image.new("L", (width, height))
    corners = np.array([(-0.5, -1, 0), (-0.5, 1, 0), (0.5, 1, 0), (0.5, -1, 0)]) * car.size
    for grow, blur, dark in ((1.25, 26, 0.35), (1.0, 8, 0.6)):  # half shadow, core shadow
        shadow = Image.new("L", (width // 4, height // 4))  # blurred anyway
        outline = [(x / 4, y / 4) for x, y in project(corners * grow)]
        ImageDraw.Draw(shadow).polygon(outline, int(255 * dark))
        shadow = shadow.filter(ImageFilter.GaussianBlur(blur / 4)).resize((width, height))
        photo.paste("#101012", mask=shadow)

    def far_to_near(parts):
        return sorted(parts, key=lambda part: -np.linalg.norm(part[0].mean(0) - camera))

    on_photo, on_mask = ImageDraw.Draw(photo), ImageDraw.Draw(mask)
    near = [discs for side, discs in car.wheels if side * camera[1] > car.size[1]]
    far = [discs[:5] for side, discs in car.wheels if side * camera[1] <= car.size[1]]
    body, cabin = car.faces[: car.cabin_start], car.faces[car.cabin_start :]
    details = [part for part in car.details if part[2] @ (camera - part[0].mean(0)) > 0]
    groups = sum(far, []), *map(far_to_near, (body, cabin, details)), sum(near, [])
    for points, colour, normal in sum(groups, []):
        polygon = project(points)
        on_photo.polygon(polygon, shade(colour, normal, camera, points))
        on_mask.polygon(polygon, 255)

    photo = np.asarray(photo.reduce(SMOOTH), float) * rng.uniform(0.85, 1.1)
    photo += rng.normal(0, 3, photo.shape)
    mask = Image.fromarray((np.asarray(mask.reduce(SMOOTH)) > 127).astype(np.uint8), "P")
    mask.putpalette([0, 0, 0, 255, 255, 255])
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8)), mask


def shade(colour, normal, camera, points):
    """A surface's colour under the lamp, with a gloss where it mirrors it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    to_camera = camera - points.mean(0)
    half = LIGHT + to_camera / np.linalg.norm(to_camera)
    gloss = max(0, normal @ half / np.linalg.norm(half)) ** 30
    light = 0.55 + 0.5 * max(0, normal @ LIGHT)
    return tuple(int(c) for c in (rgb * light + 90 * gloss).clip(0, 255))
