"""What is done to a photo and its mask on their way to the network, by albumentations.

Each augmentation below is a list to read and to edit; `--augment` takes it by its name.
"""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before its import, or each start asks the network

import albumentations as A
import cv2
from albumentations.pytorch import ToTensorV2

MEAN, STD, MAX_PIXEL_VALUE = 0.0, 1.0, 255.0  # the classic normalization: photos from 0 to 1


def classic():
    """The recipe of the tutorials: turned up to 35 degrees, mirrored, now and then upside down."""
    return [A.Rotate(limit=35, p=1.0), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)]


def flip():
    """Mirrored only: for objects that always stand upright, as cars do, and short trainings."""
    return [A.HorizontalFlip(p=0.5)]


def strong():
    """Mirrored, moved, scaled, in other light and colours, noisy or blurred: for few photos."""
    return [
        A.HorizontalFlip(p=0.5),
        A.Affine(
            scale=(0.8, 1.25),
            translate_percent=(-0.1, 0.1),
            rotate=(-5, 5),
            border_mode=cv2.BORDER_REFLECT_101,
            p=0.8,
        ),
        A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.8),
        A.OneOf([A.GaussNoise(std_range=(0.01, 0.05)), A.GaussianBlur(blur_limit=(3, 5))], p=0.2),
    ]


AUGMENTATIONS = {"classic": classic, "flip": flip, "strong": strong}


def get_train_transform(
    height, width, mean=MEAN, std=STD, max_pixel_value=MAX_PIXEL_VALUE, augment="classic"
):
    """What training does to a photo and its mask."""
    return A.Compose(
        [
            A.Resize(height, width),
            *AUGMENTATIONS[augment](),
            A.Normalize(mean, std, max_pixel_value),
            ToTensorV2(),
        ]
    )


def get_eval_transform(height, width, mean=MEAN, std=STD, max_pixel_value=MAX_PIXEL_VALUE):
    """What evaluation and prediction do to a photo: size and normalization, nothing random."""
    return A.Compose(
        [A.Resize(height, width), A.Normalize(mean, std, max_pixel_value), ToTensorV2()]
    )
