"""One photo in and its probabilities out: a trained network with all that goes before and after it.

from predictor import Predictor
mask = Predictor("weights/unet_carvana_small.pth").mask("car.jpg")    # (H, W), 0 and 255
"""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import torch

from augment import get_eval_transform
from checkpoints import (
    BEST_CHECKPOINT,
    CHECKPOINT,
    SHIPPED,
    build_model,
    find_checkpoint,
    load_checkpoint,
)
from files import BadInput, photo_size, read_photo
from utils import logits_of, pick_device, predicted_masks

ROOT = Path(__file__).resolve().parent


class Predictor:
    """A trained network that takes photos' files.

    Args:
        checkpoint: a file that train.py or export.py (.onnx) wrote; by default the repository's
            best_checkpoint.pth.tar, else its my_checkpoint.pth.tar, else the weights that ship.
        device: "cuda", "mps", "cpu" or "auto".
        height, width: what photos are scaled to for the network; None: as in training.
        tta: average each photo's logits with those of its mirror image.

    Attributes:
        filename: the checkpoint's.
        size: (height, width) that photos are scaled to.
        channels: 3 for RGB, 1 for grey.
        device: a torch.device.
        threshold: the checkpoint's own: a pixel is object where its probability is above it.

    Raises BadInput for a checkpoint that cannot be used; its methods, for a photo that cannot.
    """

    def __init__(self, checkpoint=None, device="auto", height=None, width=None, tta=False):
        self.filename = os.fspath(checkpoint or default_checkpoint())
        self.device = pick_device(device)
        load = load_onnx if self.filename.lower().endswith(".onnx") else load_torch
        size, self.channels, self.threshold, self.answer = load(self.filename, self.device, tta)
        self.size = (height or size[0], width or size[1])

    def read(self, path):
        """A photo as the network takes it: (height, width, channels), uint8."""
        return read_photo(path, self.size, self.channels)

    def logits(self, photos):
        """The network's answer to photos that `read` gave: (N, height, width), float32."""
        return self.answer(np.stack(photos))

    def probabilities(self, path):
        """A photo's probabilities of being object, at its own size: (H, W), float32, 0 to 1."""
        return sigmoid(self.full_size_logits(path))

    def mask(self, path, threshold=None):
        """A photo's mask at its own size: (H, W), uint8, 0 and 255."""
        return binary_mask(self.full_size_logits(path), threshold or self.threshold)

    def full_size_logits(self, path):
        return scale(self.logits([self.read(path)])[0], photo_size(path))


def default_checkpoint():
    """The repository's best_checkpoint, else its my_checkpoint, else the weights that ship."""
    return find_checkpoint(*(ROOT / name for name in (BEST_CHECKPOINT, CHECKPOINT, SHIPPED)))


def scale(logits, size):
    """Bring logits (h, w), float32, to `size`, (height, width), as test.py --full-size does."""
    return cv2.resize(logits, size[::-1], interpolation=cv2.INTER_LINEAR)


def binary_mask(logits, threshold):
    """255 where the probability is above the threshold, else 0: uint8, of the logits' shape."""
    return predicted_masks(logits, threshold).view(np.uint8) * np.uint8(255)


def sigmoid(logits):
    """Probabilities, in the place of the logits."""
    return torch.from_numpy(logits).sigmoid_().numpy()


# The two that compute. Each gives (size, channels, threshold, answer): `answer` takes photos
# (N, height, width, channels), uint8, and gives logits (N, height, width), float32 ----------------


def load_torch(filename, device, tta):
    """A checkpoint of train.py, computed by PyTorch on a torch.device. Raises BadInput."""
    checkpoint = load_checkpoint(filename)
    model = build_model(checkpoint, filename, device)

    def answer(photos):
        transform = get_eval_transform(*photos.shape[1:3], **checkpoint["normalization"])
        images = torch.stack([transform(image=photo)["image"] for photo in photos])
        with torch.inference_mode():
            return logits_of(model, images, device, tta)[:, 0].cpu().numpy()

    network = checkpoint["model"]
    return checkpoint["image_size"], network["in_channels"], checkpoint["threshold"], answer


def load_onnx(filename, device, tta):
    """A file of export.py, computed by onnxruntime on a torch.device. Raises BadInput."""
    try:
        import onnxruntime
    except ImportError:
        raise BadInput(f"{filename}: needs a package more: pip install onnxruntime") from None
    if not os.path.isfile(filename):
        raise BadInput(f"{filename}: no such file: make one with python export.py")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which come as exceptions too
    there = onnxruntime.get_available_providers()
    wanted = ("CUDAExecutionProvider",) if device.type == "cuda" else ()
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in there]
    try:
        session = onnxruntime.InferenceSession(filename, options, providers)
        facts = session.get_modelmeta().custom_metadata_map
        size, threshold = json.loads(facts["image_size"]), json.loads(facts["threshold"])
        (photos,), (output,) = session.get_inputs(), session.get_outputs()
        channels, probabilities = photos.shape[3], output.name == "probabilities"
    except Exception as error:  # onnxruntime has many
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{filename}: no file of export.py ({reason}): make it again with python export.py"
        ) from None

    def run(photos):
        (result,) = session.run(None, {"photos": np.ascontiguousarray(photos)})
        result = result[:, 0].astype(np.float32)
        if probabilities:
            result = torch.from_numpy(result).logit_(eps=1e-7).numpy()
        return result

    def answer(photos):
        logits = run(photos)
        if tta:
            logits = (logits + run(photos[:, :, ::-1])[:, :, ::-1]) / 2
        return logits

    return size, channels, threshold, answer
