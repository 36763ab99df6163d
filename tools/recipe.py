"""Train by the recipe of docs/results.md: on small photos first, which is quick, then larger ones.

    python tools/recipe.py                                          into runs/recipe
    python tools/recipe.py --data-dir DIR --output-dir runs/mine    all flags of train.py

Each stage is a training of train.py that starts from the best weights of the one before. The last
one's files are in the output folder itself, the others' in stage1/, stage2/, ... in it. Stopped,
the same command goes on where it was; other photos or flags need another --output-dir.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import train  # noqa: E402
import utils  # noqa: E402
from support import settings  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.pairs import pair_up  # noqa: E402

WIDE, NARROW = "--features 16 32 64 96 128 128", "--features 8 16 32 64 96 96"
SMALL = "--image-height 160 --image-width 240 --batch-size 16"
MEDIUM = "--image-height 320 --image-width 480 --batch-size 8 --lr 5e-3"
LARGE = "--image-height 640 --image-width 960 --batch-size 8 --lr 5e-3"
STAGES = {  # by hardware: each stage's flags, and how many photos it sees in all
    "gpu": [(f"{SMALL} {WIDE}", 40_000), (LARGE, 60_000)],
    "bfloat16": [(f"{SMALL} {WIDE}", 14_000), (MEDIUM, 21_000)],
    "float32": [(f"{SMALL} {NARROW}", 10_000), (MEDIUM, 14_000)],
}
MAX_EPOCHS = 50  # of a stage, where photos are few


def get_args_parser():
    """The flags of recipe.py itself."""
    about = f"{__doc__.splitlines()[0]} All other flags are train.py's, for each stage."
    parser = Parser(prog="recipe.py", description=about, allow_abbrev=False)
    parser.add_argument("--stages", choices=tuple(STAGES), help="default: by this machine")
    return parser


def main(argv=None):
    """Train all stages, as the flags in argv say; returns the exit code."""
    args, flags = get_args_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    flags = list(map(str, flags))
    given = settings.read_flags(settings.get_args_parser(train.Settings, "train.py"), flags)
    device = utils.pick_device(given.get("device", train.DEVICE), tune=False)
    cpu = "bfloat16" if utils.amp_dtype(device) else "float32"
    stages = STAGES[args.stages or ("gpu" if device.type == "cuda" else cpu)]
    output = Path(given.get("output_dir", train.ROOT / "runs" / "recipe"))
    folders = (
        given.get(n, getattr(train.Settings, n)) for n in ("train_img_dir", "train_mask_dir")
    )
    pairs, _ = pair_up(*(train.ROOT / folder for folder in folders), given.get("mask_suffix"))
    start = []
    for number, (stage, seen) in enumerate(stages, start=1):
        folder = output / (f"stage{number}" if number < len(stages) else "")
        epochs = min(max(1, round(seen / len(pairs))), MAX_EPOCHS)
        words = ["--recipe", "better", *stage.split(), "--epochs", str(epochs), *flags, *start]
        words += ["--output-dir", str(folder), "--load-model"]
        print(f"Stage {number} of {len(stages)}: train.py {' '.join(words)}")
        print("If it is stopped, the same command of recipe.py goes on", flush=True)
        if code := train.main(words):
            return code
        start = ["--pretrained", str(folder / utils.BEST_CHECKPOINT)]
    return 0


if __name__ == "__main__":
    run_script(main)
