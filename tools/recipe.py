"""Train by the recipe of docs/results.md: on small photos first, which is quick, then larger ones.

    python tools/recipe.py --output-dir runs/hour                an hour on a CPU, less on a GPU
    python tools/recipe.py --output-dir runs/hour --data-dir DIR --stages float32

Each stage is a training of train.py that starts from the best weights of the one before. The last
one's files are in the output folder itself, the others' in stage1/, stage2/, ... in it. All other
flags are train.py's and hold for each stage. Stopped, the same command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import train  # noqa: E402
import utils  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.pairs import list_images  # noqa: E402

WIDE, NARROW = "--features 16 32 64 96 128 128", "--features 8 16 32 64 96 96"
MEDIUM = "--image-height 320 --image-width 480 --batch-size 8 --lr 5e-3"
LARGE = "--image-height 640 --image-width 960 --batch-size 8 --lr 5e-3"
MOST = 50  # epochs of a stage, of few photos
STAGES = {  # by what there is to compute with; how many photos are seen, in however many epochs
    "gpu": [(WIDE, 40_000), (LARGE, 60_000)],
    "bfloat16": [(WIDE, 14_000), (MEDIUM, 21_000)],
    "float32": [(NARROW, 10_000), (MEDIUM, 14_000)],
}


def main(argv=None):
    """Train all stages, as the flags in argv say; returns the exit code."""
    parser = Parser(prog="recipe.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stages", choices=tuple(STAGES), help="default: what this machine has")
    parser.add_argument("--output-dir", default="runs/recipe", type=Path, help="for all files")
    args, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    device = utils.pick_device(tune=False)
    cpu = "bfloat16" if utils.amp_dtype(device) else "float32"
    stages, start = STAGES[args.stages or (cpu if device.type == "cpu" else "gpu")], []
    given = train.read_flags(train.get_args_parser(train.Settings, "train.py"), flags)
    photos = len(list_images(train.ROOT / given.get("train_img_dir", train.TRAIN_IMG_DIR)))
    for number, (stage, seen) in enumerate(stages, start=1):
        folder = args.output_dir / (f"stage{number}" if number < len(stages) else "")
        stage += f" --epochs {min(max(1, round(seen / photos)), MOST)}"
        print(f"Stage {number} of {len(stages)}: {stage}", flush=True)
        stage = ["--recipe", "better", *stage.split(), *start, *flags, "--load-model"]
        if code := train.main([*stage, "--output-dir", str(folder)]):
            print("The same command of recipe.py goes on with this stage and the rest of them")
            return code
        start = ["--pretrained", str(folder / utils.BEST_CHECKPOINT)]
    return 0


if __name__ == "__main__":
    run_script(main)
