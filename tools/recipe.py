"""Train by the recipe of docs/results.md: on small photos first, which is quick, then larger ones.

    python tools/recipe.py                                          into runs/recipe
    python tools/recipe.py --data-dir DIR --output-dir runs/mine    all flags of train.py

Each stage is a training of train.py that starts from the best weights of the one before. The last
one's files are in the output folder itself, the others' in stage1/, stage2/, ... in it. Stopped,
the same command goes on where it was; other photos or flags need another --output-dir.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import train  # noqa: E402
import utils  # noqa: E402
from dataset import split_by_car  # noqa: E402
from support import distributed, settings  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.errors import BadInput, display_path, short_path  # noqa: E402
from support.pairs import pair_up  # noqa: E402

WIDE, NARROW = "--features 16 32 64 96 128 128", "--features 8 16 32 64 96 96"
SMALL = "--image-height 160 --image-width 240 --batch-size 16"
MEDIUM = "--image-height 320 --image-width 480 --batch-size 8 --lr 5e-3"
LARGE = "--image-height 640 --image-width 960 --batch-size 8 --lr 5e-3"
LONGER, LARGER = f"{MEDIUM} --lr 8e-3", f"{LARGE} --batch-size 4 --lr 4e-3"
STAGES = {  # the network, each stage's flags, and how many photos it trains on in all
    "gpu": (WIDE, {SMALL: 36_000, LARGE: 54_000}),
    "bfloat16": (WIDE, {SMALL: 12_500, MEDIUM: 19_000}),
    "long": (WIDE, {SMALL: 12_500, MEDIUM: 19_000, LONGER: 31_000, LARGER: 10_500}),
    "float32": (NARROW, {SMALL: 9_000, MEDIUM: 12_500}),
}
MAX_EPOCHS = 50  # of a stage, where photos are few


def get_args_parser():
    """The flags of recipe.py itself."""
    about = f"{__doc__.splitlines()[0]} All other flags are train.py's, --output-dir runs/recipe."
    parser = Parser(prog="recipe.py", description=about, allow_abbrev=False)
    parser.add_argument("--stages", choices=tuple(STAGES), help="default: by machine, never long")
    return parser


def main(argv=None):
    """Train all stages, as the flags in argv say; returns the exit code."""
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    args, flags = get_args_parser().parse_known_args(argv)
    given = settings.read_flags(settings.get_args_parser(train.Settings, "train.py"), flags)
    chosen = train.Settings(**given)
    output = Path(given.get("output_dir", train.ROOT / "runs" / "recipe"))
    device = utils.pick_device(chosen.device, tune=False)
    cpu = "bfloat16" if utils.amp_dtype(device) else "float32"
    network, stages = STAGES[args.stages or ("gpu" if device.type == "cuda" else cpu)]
    images, masks = train.ROOT / chosen.train_img_dir, train.ROOT / chosen.train_mask_dir
    pairs, _ = pair_up(images, masks, chosen.mask_suffix)
    if not (chosen.val_img_dir and (train.ROOT / chosen.val_img_dir).exists()):
        pairs, _ = split_by_car(pairs, group=chosen.group)

    folders = [output / f"stage{number}" for number in range(1, len(stages))] + [output]
    if (output / utils.CHECKPOINT).exists() and not (folders[-2] / utils.BEST_CHECKPOINT).exists():
        raise BadInput(output / utils.CHECKPOINT, "is of another run", "name an --output-dir")
    network, start = [] if "pretrained" in given else network.split(), []
    with distributed.process_group(device):
        for folder, (stage, photos) in zip(folders, stages.items(), strict=True):
            epochs = min(max(1, round(photos / len(pairs))), MAX_EPOCHS)
            words = ["--recipe", "better", *network, *stage.split(), "--epochs", str(epochs)]
            words += [*flags, *start, "--output-dir", str(folder), "--load-model"]
            with distributed.first_before_others():  # it wrote what they start from
                print(f"Stage in {display_path(folder)}: train.py {shlex.join(words)}", flush=True)
            if code := train.main(words, again=[short_path(Path(__file__)), *argv]):
                return code
            network, start = [], ["--pretrained", str(folder / utils.BEST_CHECKPOINT)]
    return 0


if __name__ == "__main__":
    run_script(main)
