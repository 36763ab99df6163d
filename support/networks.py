"""A trained network ready to answer photos, whatever kind of file it came from."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from support.errors import BadInput, printable

VERSION_1_0 = {"classes": '["object"]', "crop": "null"}  # metadata that its files lack


@dataclass(frozen=True)
class Network:
    """A network and what its file says about it.

    Attributes:
        answer: function from photos (N, height, width, channels), uint8, to logits
            (N, K, height, width), a float32 tensor on the CPU.
        image_size: (height, width) of photos in training.
        channels: 3 for RGB, 1 for grey.
        threshold: probability above which a pixel is object.
        classes: names of the K classes.
        crop: side of the squares that it was trained on, in pixels; None for whole photos.
    """

    answer: Callable
    image_size: tuple[int, int]
    channels: int
    threshold: float
    classes: list[str]
    crop: int | None


def load_onnx(filename, device):
    """The Network in a file of tools/export.py, computed by onnxruntime. Raises BadInput."""
    try:
        import onnxruntime

        wanted = (f"{device.type.upper()}ExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in onnxruntime.get_available_providers() if name in wanted]
        session = onnxruntime.InferenceSession(filename, providers=providers)
        return network_of(session)
    except Exception as error:  # onnxruntime raises many types
        why = printable(" ".join(str(error).split())[:200])
        remedy = "pip install onnxruntime, or export it again"
        raise BadInput(filename, f"cannot be used ({why})", remedy) from None


def network_of(session):
    """The Network of an onnxruntime.InferenceSession. Raises many types for wrong metadata."""
    (photos_input,) = session.get_inputs()
    (output,) = session.get_outputs()
    metadata = VERSION_1_0 | session.get_modelmeta().custom_metadata_map
    height, width = json.loads(metadata["image_size"])
    crop = json.loads(metadata["crop"])

    def answer(photos):
        (result,) = session.run(None, {"photos": np.ascontiguousarray(photos)})
        result = torch.from_numpy(result.astype(np.float32))
        return result.logit_(eps=1e-7) if output.name == "probabilities" else result

    return Network(
        answer=answer,
        image_size=(int(height), int(width)),
        channels=photos_input.shape[3],
        threshold=float(json.loads(metadata["threshold"])),
        classes=[str(name) for name in json.loads(metadata["classes"])],
        crop=None if crop is None else int(crop),
    )
