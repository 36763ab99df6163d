"""A checkpoint for others: as ONNX, for runtimes other than PyTorch, or as a small weights file.

    python tools/export.py                                    best_checkpoint, ... -> unet.onnx
    python tools/export.py photos --checkpoint FILE           checked on these, not on drawn cars
    python tools/export.py --output weights/small.pth         a twentieth of a checkpoint's size

What the ONNX graph takes and gives, with N, height and width free:

    photos         (N, height, width, channels), uint8: RGB, or grey, as decoded; it normalizes
    logits         (N, K, height, width), float32; an object is where they are above 0; of K classes
                   a pixel has the one whose logit is the highest, if that is above 0
    probabilities  the same through a sigmoid, instead of logits, with --probabilities

Its metadata: image_size (height, width: in training), threshold, classes (their names), crop (side
of the tiles of photos at their own size that it should be given, or null), version (of this text).
It gets its name once onnx's checker has passed it and onnxruntime has given PyTorch's own answers.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import utils  # noqa: E402
from data.draw_demo import draw_car  # noqa: E402
from predict import Predictor, find_photos, load_onnx  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.errors import BadInput, display_path  # noqa: E402
from support.pictures import find_objects, sigmoid  # noqa: E402
from support.writing import check_output, write_aside  # noqa: E402

VERSION = "1.1"
OPSET = 18
TOLERANCE = {"float32": (1e-3, 0.9999), "float16": (1e-1, 0.999)}  # see check_answers


def get_args_parser():
    """The flags of export.py."""
    parser = Parser(prog="export.py", description="Write a checkpoint as ONNX or small weights.")
    add = parser.add_argument
    add("photos", nargs="*", metavar="PHOTO", help="files and folders to check the ONNX file on")
    add("--checkpoint", metavar="FILE", help="of train.py (default: the same as predict.py's)")
    output = "an .onnx file, or a .pth file of small weights (default: unet.onnx)"
    add("--output", metavar="FILE", type=Path, default=Path("unet.onnx"), help=output)
    add("--probabilities", action="store_true", help="give probabilities instead of logits")
    add("--fp16", action="store_true", help="compute in float16: half the size, for GPUs")
    return parser


def save_weights(checkpoint, filename):
    """Write what evaluation and --pretrained need of a checkpoint, its convolutions in float16."""
    weights = {
        name: tensor.half() if tensor.dim() == 4 else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    kept = {name: checkpoint[name] for name in ("model", *utils.CLASSIC)}
    utils.save_checkpoint({"state_dict": weights} | kept, filename)


class PhotosToLogits(nn.Module):
    """What the ONNX file computes: the network of a checkpoint with the normalization before it."""

    def __init__(self, checkpoint, fp16=False, probabilities=False):
        super().__init__()
        self.dtype = torch.float16 if fp16 else torch.float32
        self.probabilities = probabilities
        model = utils.build_model(checkpoint)
        self.model = model.to(self.dtype, memory_format=torch.contiguous_format)
        # As albumentations' Normalize has it.
        normalization = checkpoint["normalization"]
        for name in ("mean", "std"):
            values = torch.tensor(normalization[name], dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values * normalization["max_pixel_value"])

    def forward(self, photos):
        images = (photos.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, C, H, W)
        logits = self.model(images.to(self.dtype)).float()
        return logits.sigmoid() if self.probabilities else logits


def to_onnx(checkpoint, fp16=False, probabilities=False):
    """A checkpoint that load_checkpoint gave, as an onnx.ModelProto with metadata.

    Raises BadInput where a package is missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput("ONNX", "needs a package more", f"pip install {error.name}") from None
    # Not the smallest photos, for which the exporter would take a size as one that never changes.
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
    facts = {n: json.dumps(checkpoint[n]) for n in ("image_size", "threshold", "classes", "crop")}
    facts["version"] = VERSION
    facts["input"] = "photos as decoded: uint8, (batch, height, width, channels), 0 to 255"
    onnx.helper.set_model_props(proto, facts)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def compare(checkpoint, onnx_file, network, photos):
    """Yield the logits (K, h, w) of PyTorch, in float32, and of the file for each photo, or of one
    of crops for the middle of each."""
    graph = PhotosToLogits(checkpoint).eval()
    _, answer = load_onnx(onnx_file, torch.device("cpu"))

    def answers(photo):
        with torch.inference_mode():
            expected = graph(torch.from_numpy(photo.copy())[None])[0].numpy()
        return expected, answer(photo[None])[0].numpy()

    for path in photos:
        photo, side = network.read(path), network.crop
        top, left = ((n - side) // 2 if side and n > side else 0 for n in photo.shape[:2])
        photo = photo[top:, left:][:side, :side]
        yield answers(photo)
        if path == photos[0]:
            yield answers(photo[1::2, ::3])  # another size, and odd where that one is not


def check_answers(answers, threshold, fp16):
    """Compare pairs of logits (K, h, w), PyTorch's and the file's; returns the result as a
    sentence.

    Raises BadInput where probabilities differ by more than TOLERANCE allows, or masks in a greater
    share of pixels.
    """
    worst, same, pixels, count = 0.0, 0, 0, 0
    for expected, found in answers:
        masks = [find_objects(logits, threshold) for logits in (expected, found)]
        same, pixels = same + (masks[0] == masks[1]).sum(), pixels + masks[0].size
        count += 1
        difference = np.abs(sigmoid(expected.copy()) - sigmoid(found.copy())).max()
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    most, least = TOLERANCE["float16" if fp16 else "float32"]
    result = (
        f"on {count} photos probabilities differ by at most {worst:.1e} from PyTorch's, and "
        f"{same / pixels:.4%} of the masks' pixels are the same"
    )
    if worst > most or same / pixels < least:
        raise BadInput("the exported network", f"answers otherwise ({result})", "train it anew")
    return result


def main(argv=None):
    """Write the file that the flags in argv name; returns the exit code."""
    args = get_args_parser().parse_args(argv)
    if args.output.suffix not in (".onnx", ".pth") or args.output.is_dir():
        raise BadInput(args.output, "neither .onnx nor .pth", "name such a file with --output")
    check_output(args.output.parent, "--output")
    network = Predictor(args.checkpoint, "cpu")
    checkpoint = utils.load_checkpoint(network.filename)
    if args.output.suffix == ".pth":
        save_weights(checkpoint, args.output)
        result = "convolutions in float16, without what only resuming needs"
    else:
        with tempfile.TemporaryDirectory() as folder:
            if not args.photos:
                draw_car((0, Path(folder)))
            photos = find_photos(args.photos or [f"{folder}/train_images"])
            proto = to_onnx(checkpoint, args.fp16, args.probabilities)
            with write_aside(args.output) as file:
                file.write(proto.SerializeToString())
                file.flush()
                answers = compare(checkpoint, file.name, network, photos)
                result = check_answers(answers, network.threshold, args.fp16)
    size = args.output.stat().st_size / 1e6
    print(
        f"{display_path(network.filename)} as {display_path(args.output)}, {size:.1f} MB; {result}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
