"""A checkpoint as ONNX, for runtimes other than PyTorch.

    python export.py                                          best_checkpoint, ... -> unet.onnx
    python export.py --checkpoint FILE --output car.onnx
    python export.py photos                                   checked on these, not on drawn cars

What the graph takes and gives, with N, height and width free:

    photos         (N, height, width, channels), uint8: RGB, or grey, as decoded; it normalizes
    logits         (N, 1, height, width), float32; the object is where they are above 0
    probabilities  the same through a sigmoid, instead of logits, with --probabilities

    import onnxruntime
    session = onnxruntime.InferenceSession("unet.onnx")
    (logits,) = session.run(None, {"photos": photos})

Its metadata say what else one has to know: image_size (height, width: what photos were scaled to in
training), threshold, version (of this description). The file gets its name once onnx's checker has
passed it and onnxruntime has given PyTorch's own answers.
"""

import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import build_model, load_checkpoint
from command_line import Parser, run_script
from data.draw_demo import draw_car
from files import (
    BadInput,
    check_output,
    find_photos,
    in_threads,
    read_photo,
    shown,
    write_aside,
)
from predictor import default_checkpoint, load_onnx, sigmoid
from utils import predicted_masks

VERSION = "1.0"
OPSET = 18
TOLERANCE = {"float32": (1e-3, 0.9999), "float16": (1e-1, 0.999)}  # see check_answers


def get_args_parser():
    parser = Parser(prog="export.py", description="Write a checkpoint as ONNX.")
    parser.add_argument(
        "photos", nargs="*", metavar="PHOTO", help="files and folders to check the file on"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="of train.py; without, the same as predict.py's"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("unet.onnx"),
        help="what to write (default: unet.onnx)",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="give probabilities instead of logits"
    )
    parser.add_argument(
        "--fp16", action="store_true", help="compute in float16: half the size, for GPUs"
    )
    return parser


class PhotosToLogits(nn.Module):
    """What the file computes: a UNet with the normalization before it, in float16 if told so."""

    def __init__(self, model, normalization, fp16, probabilities):
        super().__init__()
        self.dtype = torch.float16 if fp16 else torch.float32
        self.model = model.to(self.dtype)
        self.probabilities = probabilities
        # As albumentations' Normalize has it.
        most = normalization["max_pixel_value"]
        for name in ("mean", "std"):
            values = torch.tensor(normalization[name], dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values * most)

    def forward(self, photos):
        images = (photos.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, C, H, W)
        logits = self.model(images.to(self.dtype)).float()
        return logits.sigmoid() if self.probabilities else logits


def to_onnx(checkpoint, filename, fp16=False, probabilities=False):
    """A checkpoint that load_checkpoint gave, as an onnx.ModelProto with metadata.

    Raises BadInput where a package is missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput(f"export.py: needs a package more: pip install {error.name}") from None
    model = build_model(checkpoint, filename, torch.device("cpu"))
    model.to(memory_format=torch.contiguous_format)
    graph = PhotosToLogits(model, checkpoint["normalization"], fp16, probabilities).eval()
    # Not the smallest photos, for which the exporter would take a size as one that never changes.
    photos = torch.zeros(2, 96, 144, checkpoint["model"]["in_channels"], dtype=torch.uint8)
    program = torch.onnx.export(
        graph,
        (photos,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["photos"],
        output_names=["probabilities" if probabilities else "logits"],
        dynamic_shapes={"photos": {0: "batch", 1: "height", 2: "width"}},
    )
    proto = program.model_proto
    facts = {
        "image_size": json.dumps(checkpoint["image_size"]),
        "threshold": json.dumps(checkpoint["threshold"]),
        "version": VERSION,
        "input": "photos as decoded: uint8, (batch, height, width, channels), 0 to 255",
    }
    onnx.helper.set_model_props(proto, facts)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check_answers(answers, threshold, fp16):
    """Compare pairs of logits (h, w), PyTorch's and the file's; returns the result as a sentence.

    Raises BadInput where probabilities differ by more than TOLERANCE allows, or masks in a greater
    share of pixels.
    """
    worst, same, pixels, count = 0.0, 0, 0, 0
    for expected, found in answers:
        masks = [predicted_masks(logits, threshold) for logits in (expected, found)]
        same, pixels, count = same + (masks[0] == masks[1]).sum(), pixels + found.size, count + 1
        difference = np.abs(sigmoid(expected.copy()) - sigmoid(found.copy())).max()
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    most, least = TOLERANCE["float16" if fp16 else "float32"]
    result = (
        f"on {count} photos probabilities differ by at most {worst:.1e} from PyTorch's, and "
        f"{same / pixels:.4%} of the masks' pixels are the same"
    )
    if worst > most or same / pixels < least:
        raise BadInput(f"the exported network answers otherwise: {result}: train it anew")
    return result


def compare(checkpoint, filename, onnx_file, photos):
    """Yield the logits (h, w) of PyTorch, in float32, and of the file for each photo."""
    cpu = torch.device("cpu")
    graph = PhotosToLogits(
        build_model(checkpoint, filename, cpu), checkpoint["normalization"], False, False
    ).eval()
    size, channels, _, answer = load_onnx(onnx_file, cpu, tta=False)

    def answers(photo):
        with torch.inference_mode():
            expected = graph(torch.from_numpy(photo.copy())[None])[0, 0].numpy()
        return expected, answer(photo[None])[0]

    read = functools.partial(read_photo, size=tuple(size), channels=channels)
    for number, photo in enumerate(in_threads(read, photos, ahead=8)):
        yield answers(photo)
        if number == 0:
            yield answers(photo[1::2, ::3])  # another size, and odd where that one is not


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.output.suffix != ".onnx" or args.output.is_dir():
        raise BadInput(
            f"{shown(args.output)}: no ONNX file: name one that ends in .onnx with --output"
        )
    filename = args.checkpoint or default_checkpoint()
    checkpoint = load_checkpoint(filename)
    check_output(args.output.parent, "--output")
    with tempfile.TemporaryDirectory() as folder:
        if not args.photos:
            draw_car((0, Path(folder)))
        photos = find_photos(args.photos or [f"{folder}/train_images"])
        proto = to_onnx(checkpoint, filename, args.fp16, args.probabilities)
        with write_aside(args.output) as file:
            file.write(proto.SerializeToString())
            file.flush()
            answers = compare(checkpoint, filename, file.name, photos)
            result = check_answers(answers, checkpoint["threshold"], args.fp16)
    size = args.output.stat().st_size / 1e6
    print(f"{filename} as {shown(args.output)}, {size:.1f} MB; {result}")
    return 0


if __name__ == "__main__":
    run_script(main)
