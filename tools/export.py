"""Export a checkpoint: to ONNX, for runtimes other than PyTorch, or to a small file of weights.

    python tools/export.py                                    best_checkpoint, ... -> unet.onnx
    python tools/export.py photos --checkpoint FILE           checked on these, not on drawn cars
    python tools/export.py --output weights/small.pth         a twentieth of a checkpoint's size

Input and output of the ONNX graph; N, height and width are dynamic:

    photos         (N, height, width, channels), uint8: RGB or grey, as decoded; the graph
                   normalizes them
    logits         (N, K, height, width), float32; above 0 a pixel is object; with several classes
                   it has the class of the highest logit, if that is above 0
    probabilities  with --probabilities instead of logits: their sigmoid

Metadata: image_size (height and width of photos in training), threshold, classes (their names),
crop (side of the tiles in which the network should see photos at their own size, or null), version
(of this description). The file is written only if onnx's checker accepts it and onnxruntime gives
PyTorch's answers.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import utils  # noqa: E402
from data.draw_demo import draw_car  # noqa: E402
from predict import Predictor, find_photos  # noqa: E402
from support.command_line import Parser, arguments, run_script  # noqa: E402
from support.errors import BadInput, display_path  # noqa: E402
from support.networks import load_onnx  # noqa: E402
from support.pictures import find_objects, sigmoid  # noqa: E402
from support.writing import check_output, write_aside  # noqa: E402

VERSION = "1.1"
OPSET = 18


class Limits(NamedTuple):
    """How far an exported network's answers may be from PyTorch's."""

    difference: float  # of two probabilities, at most
    same_pixels: float  # share of the masks' pixels, at least


FP32_LIMITS = Limits(difference=1e-3, same_pixels=0.9999)
FP16_LIMITS = Limits(difference=1e-1, same_pixels=0.999)


def get_args_parser():
    """The flags of export.py."""
    parser = Parser(prog="export.py", description="Write a checkpoint as ONNX or small weights.")
    add = parser.add_argument
    add("photos", nargs="*", metavar="PHOTO", help="files and folders to check the ONNX file on")
    add("--checkpoint", metavar="FILE", help="of train.py (default: the same as predict.py's)")
    output = "an .onnx file, or a .pth file of small weights (default: unet.onnx)"
    add("--output", metavar="FILE", type=Path, default=Path("unet.onnx"), help=output)
    add("--probabilities", action="store_true", help="output probabilities instead of logits")
    add("--fp16", action="store_true", help="compute in float16: half the size, for GPUs")
    return parser


def save_weights(checkpoint, filename):
    """Write what evaluation and --pretrained need of a checkpoint; convolutions are in float16.
    Raises BadInput."""
    weights = {
        name: tensor.half() if tensor.dim() == 4 else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    kept = {name: checkpoint[name] for name in ("model", *utils.CLASSIC)}
    utils.save_checkpoint({"state_dict": weights} | kept, filename)


class PhotosToLogits(nn.Module):
    """What the ONNX file computes: normalization, then the network of a checkpoint.

    Shape: photos (N, height, width, channels), uint8 -> (N, K, height, width), float32.
    """

    def __init__(self, checkpoint, fp16=False, probabilities=False):
        super().__init__()
        self.dtype = torch.float16 if fp16 else torch.float32
        self.probabilities = probabilities
        model = utils.build_model(checkpoint)
        self.model = model.to(self.dtype, memory_format=torch.contiguous_format)
        # The same formula as albumentations' Normalize.
        normalization = checkpoint["normalization"]
        for name in ("mean", "std"):
            values = torch.tensor(normalization[name], dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values * normalization["max_pixel_value"])

    def forward(self, photos):
        images = (photos.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, C, H, W)
        logits = self.model(images.to(self.dtype)).float()
        return logits.sigmoid() if self.probabilities else logits


def to_onnx(checkpoint, fp16=False, probabilities=False):
    """A checkpoint that load_checkpoint returned, as an onnx.ModelProto with metadata.

    Raises BadInput if a package is missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput("ONNX", "needs another package", f"pip install {error.name}") from None
    # For very small photos the exporter would take a size as fixed.
    photos = torch.zeros(2, 96, 144, checkpoint["model"]["in_channels"], dtype=torch.uint8)
    program = torch.onnx.export(
        PhotosToLogits(checkpoint, fp16, probabilities).eval(),
        (photos,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["photos"],
        output_names=["probabilities" if probabilities else "logits"],
        dynamic_shapes={"photos": {0: "batch", 1: "height", 2: "width"}},
    )
    proto = program.model_proto
    names = ("image_size", "threshold", "classes", "crop")
    metadata = {name: json.dumps(checkpoint[name]) for name in names}
    metadata["version"] = VERSION
    metadata["input"] = "photos as decoded: uint8, (batch, height, width, channels), 0 to 255"
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def compare(checkpoint, onnx_file, network, photos):
    """Yield pairs of logits (K, h, w), float32: PyTorch's in full precision and the file's.

    A network trained on crops gets the middle of each photo. The first photo comes twice: the
    second time at another size, which is odd where the first is not.
    """
    graph = PhotosToLogits(checkpoint).eval()
    onnx_answer = load_onnx(onnx_file, torch.device("cpu")).answer

    def answers(photo):
        with torch.inference_mode():
            expected = graph(torch.from_numpy(photo.copy())[None])[0].numpy()
        return expected, onnx_answer(photo[None])[0].numpy()

    for path in photos:
        photo = network.read(path)
        if network.crop:
            photo = middle_of(photo, network.crop)
        yield answers(photo)
        if path == photos[0]:
            yield answers(photo[1::2, ::3])


def middle_of(photo, side):
    """The square of `side` pixels in the middle of a photo (H, W, C), or less if it is smaller."""
    top, left = (max(0, (length - side) // 2) for length in photo.shape[:2])
    return photo[top : top + side, left : left + side]


def check_answers(answers, threshold, fp16):
    """Compare pairs of logits (K, h, w), PyTorch's and the file's; return the result as a sentence.

    Raises BadInput if probabilities differ by more than the limit for the precision, or too few of
    the masks' pixels are the same.
    """
    largest = 0.0
    n_same = 0
    n_pixels = 0
    n_answers = 0
    for expected, found in answers:
        same = find_objects(expected, threshold) == find_objects(found, threshold)
        n_same += same.sum()
        n_pixels += same.size
        n_answers += 1
        difference = np.abs(sigmoid(expected.copy()) - sigmoid(found.copy())).max()
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    result = (
        f"on {n_answers} photos probabilities differ by at most {largest:.1e} from PyTorch's, and "
        f"{n_same / n_pixels:.4%} of the masks' pixels are the same"
    )
    limits = FP16_LIMITS if fp16 else FP32_LIMITS
    if largest > limits.difference or n_same / n_pixels < limits.same_pixels:
        reason = f"does not give PyTorch's answers ({result})"
        remedy = "leave out --fp16" if fp16 else "its weights may be too large: train it again"
        raise BadInput("the exported network", reason, remedy)
    return result


def export_onnx(checkpoint, args, network):
    """Write the ONNX file that the flags ask for, once its answers are checked; return the result
    as a sentence. Raises BadInput."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.photos:
            draw_car(0, Path(folder))
        photos = find_photos(args.photos or [f"{folder}/train_images"])
        proto = to_onnx(checkpoint, args.fp16, args.probabilities)
        with write_aside(args.output) as file:
            file.write(proto.SerializeToString())
            file.flush()
            answers = compare(checkpoint, file.name, network, photos)
            return check_answers(answers, network.threshold, args.fp16)


def main(argv=None):
    """Write the file that the flags in argv name; return the exit code."""
    args = get_args_parser().parse_args(arguments(argv))
    if args.output.suffix not in (".onnx", ".pth") or args.output.is_dir():
        raise BadInput(args.output, "neither .onnx nor .pth", "name such a file with --output")
    check_output(args.output.parent, "--output")
    network = Predictor(args.checkpoint, "cpu")
    checkpoint = utils.load_checkpoint(network.filename)
    if args.output.suffix == ".pth":
        save_weights(checkpoint, args.output)
        result = "convolutions in float16, without what only resuming needs"
    else:
        result = export_onnx(checkpoint, args, network)
    names = f"{display_path(network.filename)} as {display_path(args.output)}"
    print(f"{names}, {args.output.stat().st_size / 1e6:.1f} MB; {result}")
    return 0


if __name__ == "__main__":
    run_script(main)
