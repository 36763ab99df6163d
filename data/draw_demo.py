"""Draw the demo set: cars in a studio, each from 16 sides, with exact masks.

A car is a list of coloured polygons in space, drawn in perspective; its mask is drawn with the same
polygons. Names, formats and folders are those of the Carvana challenge.
"""

import math
import os
import shutil
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from support.errors import BadInput, display_path
from support.progress import ProgressBar
from support.settings import FOLDERS

# Settings with which a laptop without a GPU trains on the demo set in minutes.
SETTINGS = {
    "recipe": "better",
    "image_height": 96,
    "image_width": 144,
    "features": (8, 16, 32, 64, 96),
    "batch_size": 4,
    "num_epochs": 6,
}

CARS = 36
VAL_CARS = 4  # the last of them
VIEWS = 16  # photos of each car
SEED = 2018

WIDTH, HEIGHT = 960, 640  # of a drawing, in pixels
SCALE = 2  # photos are smaller by this factor, which makes edges smooth

MIDDLE = np.array([0, 0, 0.65])  # of a car, in metres
LAMP = np.array([0.35, -0.5, 0.79])  # direction to the lamp, of length 1
PAINTS = ("firebrick", "royalblue", "whitesmoke", "#1e1e22", "darkgray", "darkgreen", "goldenrod")
BLACK = "#202022"  # tyres, plastic, the shadow
GLASS = "#2d3741"
HEADLIGHT = "#f5f0d7"
PLATE = "#ebebe1"
RIM = "#aaacb0"
TAILLIGHT = "#be1419"

# A car seen from its side: x runs from the rear bumper (0) to the front bumper (1), z from the
# ground (0) to the roof (1).
BELT_X = np.array([0, 0.02, 0.2, 0.7, 0.95, 1])


@dataclass(frozen=True)
class Shape:
    """The outline of a kind of car."""

    height: float  # in metres
    belt: tuple[float, ...]  # z of the body's upper edge, below the windows, at each of BELT_X
    cabin_foot: tuple[float, float]  # x of the cabin's rear and front where it stands on the body
    cabin_roof: tuple[float, float]  # x of its rear and front at the roof


SHAPES = {
    "sedan": Shape(1.45, (0.5, 0.6, 0.64, 0.6, 0.5, 0.4), (0.13, 0.75), (0.3, 0.55)),
    "hatchback": Shape(1.5, (0.5, 0.6, 0.63, 0.58, 0.5, 0.4), (0.02, 0.78), (0.12, 0.56)),
    "coupe": Shape(1.3, (0.55, 0.66, 0.68, 0.6, 0.48, 0.36), (0.08, 0.72), (0.36, 0.52)),
    "suv": Shape(1.75, (0.45, 0.58, 0.6, 0.58, 0.52, 0.4), (0.01, 0.76), (0.06, 0.6)),
    "van": Shape(2.0, (0.4, 0.5, 0.52, 0.51, 0.43, 0.34), (0.005, 0.9), (0.02, 0.7)),
    "pickup": Shape(1.75, (0.5, 0.56, 0.57, 0.58, 0.52, 0.4), (0.36, 0.73), (0.4, 0.58)),
}


def use_demo(folder):
    """Settings for training on the demo set in `folder`, which is drawn first if missing.

    Raises BadInput if it cannot be written.
    """
    if not folder.exists():
        print(f"No photos in data/: drawing a demo set into {display_path(folder)}", flush=True)
        try:
            make_demo(folder)
        except OSError as error:
            remedy = "free some space, or name photos of your own with --data-dir"
            raise BadInput(folder, f"cannot be drawn ({error.strerror})", remedy) from None
    return SETTINGS | {name: f"data/{folder.name}/{path}" for name, path in FOLDERS.items()}


def make_demo(folder):
    """Draw CARS cars into train_images, train_masks, val_images and val_masks under folder (Path).

    The photos are the same on every machine, up to differences between JPEG encoders. The folder
    appears only when it is complete.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number in ProgressBar(range(CARS), "drawing", unit=" cars"):
        draw_car(number, partial)
    os.replace(partial, folder)


def draw_car(number, folder):
    """Draw all views of car `number`, from 0 to CARS - 1.

    They are written into train_images and train_masks under `folder`, a Path, or for the last cars
    into val_images and val_masks.
    """
    side = "val" if number >= CARS - VAL_CARS else "train"
    images = folder / f"{side}_images"
    masks = folder / f"{side}_masks"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng([SEED, number])
    car = Car(rng)
    studio = draw_studio(rng)
    car_id = rng.bytes(6).hex()
    for view in range(1, VIEWS + 1):
        camera = Camera(2 * math.pi * (view - 0.7) / VIEWS, rng)
        photo, mask = draw_photo(car, studio, camera)
        photo.save(images / f"{car_id}_{view:02d}.jpg", quality=88)
        mask.save(masks / f"{car_id}_{view:02d}_mask.gif")


def draw_studio(rng):
    """A room without a car: wall, floor and a sign. An RGB image."""
    brightness = rng.uniform(150, 235)
    wall = brightness + rng.uniform(-12, 12, 3)
    floor = brightness * rng.uniform(0.7, 1.02) + rng.uniform(-12, 12, 3)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    floor_share = 1 / (1 + np.exp((rng.uniform(0.42, 0.52) - rows) / 0.012))
    room = (wall + (floor - wall) * floor_share) * (1 - 0.12 * rows)
    studio = Image.fromarray(room.clip(0, 255).astype(np.uint8)).resize((WIDTH, HEIGHT))

    position = rng.uniform((0.02, 0.04), (0.5, 0.22)) * (WIDTH, HEIGHT)
    ink = tuple((wall * rng.uniform(0.25, 0.85)).astype(int))
    font = ImageFont.load_default(rng.uniform(80, 150))
    ImageDraw.Draw(studio).text(position, "GARAGE", ink, font)
    return studio


def draw_photo(car, studio, camera):
    """The car as the camera sees it: an RGB image, and the mask, a palette image of 0 and 1."""
    shadow = Image.new("L", studio.size)
    ImageDraw.Draw(shadow).polygon(camera.outline(car.footprint), 180)
    photo = studio.copy()
    photo.paste(BLACK, mask=shadow.filter(ImageFilter.BoxBlur(12)))

    mask = Image.new("L", photo.size)
    on_photo = ImageDraw.Draw(photo)
    on_mask = ImageDraw.Draw(mask)
    for polygon in filter(camera.sees, car.polygons):
        outline = camera.outline(polygon.points)
        on_photo.polygon(outline, polygon.colour)
        on_mask.polygon(outline, 255)

    photo = ImageEnhance.Brightness(photo.reduce(SCALE)).enhance(camera.exposure)
    mask = Image.fromarray((np.asarray(mask.reduce(SCALE)) > 127).astype(np.uint8), "P")
    mask.putpalette([0, 0, 0, 255, 255, 255])
    return photo, mask


class Camera:
    """A camera that looks at the car, `angle` radians around it from straight ahead."""

    def __init__(self, angle, rng):
        distance = rng.uniform(7.5, 9)  # in metres, like all positions; see Polygon for the axes
        eye_height = rng.uniform(1.3, 2.2)
        ahead, aside = distance * math.cos(angle), distance * math.sin(angle)
        self.position = np.array([ahead, aside, eye_height])
        self.centre = rng.uniform((0.47, 0.52), (0.53, 0.6)) * (WIDTH, HEIGHT)  # shows MIDDLE
        self.zoom = WIDTH * rng.uniform(1.15, 1.4)  # the focal length, in pixels
        self.exposure = rng.uniform(0.85, 1.1)
        forward = MIDDLE - self.position
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0, 0, 1))
        right /= np.linalg.norm(right)
        self.axes = np.stack([right, np.cross(forward, right), forward])  # right, down, forward

    def sees(self, polygon):
        """Whether the outer side of a polygon faces the camera."""
        return polygon.normal @ (self.position - polygon.points[0]) > 0

    def outline(self, points):
        """Pixels [x, y, x, y, ...] that show points (n, 3), for Pillow."""
        right, down, depth = self.axes @ (points - self.position).T
        pixels = self.centre + self.zoom * np.stack([right, down], axis=1) / depth[:, None]
        return pixels.ravel().tolist()


class Car:
    """A car of random shape, size and colour.

    Attributes:
        footprint: (4, 3), in metres, the corners of the ground below it.
        polygons: a list of Polygon, in drawing order, the same for every camera: body and cabin
            are convex, so the polygons of each that face a camera do not overlap.
    """

    def __init__(self, rng):
        size = rng.uniform(0.95, 1.05)
        self.shape = SHAPES[rng.choice(list(SHAPES))]
        self.length = size * rng.uniform(3.7, 4.9)
        self.half_width = size * rng.uniform(0.82, 0.97)
        self.height = size * self.shape.height
        self.paint = rng.choice(PAINTS)
        self.wheel_radius = self.height * rng.uniform(0.185, 0.22)
        self.footprint = self.metres([(0, -1, 0), (0, 1, 0), (1, 1, 0), (1, -1, 0)])

        axles = rng.uniform((0.17, 0.79), (0.21, 0.83))
        hubs = [(x, side, self.wheel_radius / self.height) for x in axles for side in (-1, 1)]
        tyres = []  # the body hides them in part
        faces = []
        for hub in self.metres(hubs):
            inner = circle(hub * (1, 0.8, 1), self.wheel_radius)
            outer = circle(hub, self.wheel_radius)
            tyres += [*strip(inner, outer, BLACK), Polygon(inner[::-1], BLACK)]
            faces += [Polygon(outer, BLACK), Polygon(circle(hub, 0.65 * self.wheel_radius), RIM)]
        self.polygons = tyres + self.body() + self.cabin() + faces

    def metres(self, points):
        """Points (n, 3) in metres, from x and z as in Shape and y from right (-1) to left (1)."""
        return (np.array(points) - (0.5, 0, 0)) * (self.length, self.half_width, self.height)

    def loop(self, x, y, z):
        """Points around the car: at each x on the right, back on the left, and the first again.

        x runs from the rear to the front; y and z may be one number for all points.
        """
        right = self.metres(np.stack(np.broadcast_arrays(x, np.negative(y), z), axis=1))
        left = right * (1, -1, 1)
        return np.concatenate([right, left[::-1], right[:1]])

    def body(self):
        """Everything below the windows."""
        y = 1 - 0.16 * np.abs(2 * BELT_X - 1) ** 6  # narrower at both ends
        floor = 0.62 * self.wheel_radius / self.height
        sill = self.loop(BELT_X, y, floor + 0.09)
        belt = self.loop(BELT_X, y, self.shape.belt)
        skirt = strip(self.loop(BELT_X, y, floor), sill, BLACK)
        walls = strip(sill, belt, self.paint)
        right, left = belt[: len(BELT_X)], belt[len(BELT_X) : -1]
        deck = strip(right, left[::-1], self.paint)
        details = []
        front = walls[len(BELT_X) - 1]
        rear = walls[-1]
        for end, light in ((front, HEADLIGHT), (rear, TAILLIGHT)):
            details.append(patch(end, (0, 0.25), (0.55, 0.9), light))
            details.append(patch(end, (0.75, 1), (0.55, 0.9), light))
            details.append(patch(end, (0.35, 0.65), (0, 0.25), PLATE))
        return skirt + walls + deck + details

    def cabin(self):
        """Everything from the windows up."""
        x = self.shape.cabin_foot
        foot = self.loop(x, 0.93, np.interp(x, BELT_X, self.shape.belt) - 0.02)
        roof = self.loop(self.shape.cabin_roof, 0.72, 1)
        walls = strip(foot, roof, self.paint)
        glass = [patch(wall, (0.06, 0.94), (0.12, 0.9), GLASS) for wall in walls]
        return [*walls, Polygon(roof, self.paint), *glass]


class Polygon:
    """A flat, convex part of a car's surface.

    Attributes:
        points: (n, 3), in metres, counterclockwise as seen from outside. x points to the front of
            the car, y to its left, z up; the origin is on the ground below its centre.
        normal: (3,), of length 1, outwards.
        colour: (red, green, blue) under the lamp.
    """

    def __init__(self, points, paint):
        self.points = np.array(points)
        a, b, c = self.points[[0, len(points) // 3, 2 * len(points) // 3]]
        normal = np.cross(b - a, c - a)
        self.normal = normal / np.linalg.norm(normal)
        light = 0.55 + 0.55 * max(0, self.normal @ LAMP)
        self.colour = tuple(min(255, int(light * level)) for level in ImageColor.getrgb(paint))


def strip(lower, upper, paint):
    """The n - 1 quadrilaterals between two lines of points (n, 3), from left to right."""
    corners = zip(lower, lower[1:], upper[1:], upper, strict=False)
    return [Polygon(quad, paint) for quad in corners]


def patch(quad, across, up, paint):
    """A part of a quadrilateral: from left to right and from bottom to top, as shares of it."""
    low_left, low_right, high_right, high_left = quad.points
    left, right = across
    bottom, top = up
    x = np.array([[left], [right], [right], [left]])
    z = np.array([[bottom], [bottom], [top], [top]])
    low = low_left + x * (low_right - low_left)
    high = high_left + x * (high_right - high_left)
    return Polygon(low + z * (high - low), paint)


def circle(hub, radius):
    """Points (25, 3) around the hub of a wheel, counterclockwise as seen from outside the car."""
    side = np.sign(hub[1])
    angles = np.linspace(0, 2 * math.pi, 25)  # the last point is the first, to close a strip
    x = -side * np.cos(angles)
    return hub + radius * np.stack([x, np.zeros_like(x), np.sin(angles)], axis=1)
