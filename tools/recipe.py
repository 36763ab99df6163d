"""Train by the recipe of docs/results.md: on small photos first, which is quick, then larger ones.

    python tools/recipe.py --output-dir runs/hour                   on a CPU, in an hour
    python tools/recipe.py --stages gpu --output-dir runs/gpu       on a GPU

Each stage is a training of train.py that starts from the best weights of the one before. The last
one's files are in the output folder itself, the others' in stage1/, stage2/, ... in it. All other
flags are train.py's and hold for each stage. Stopped, the same command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import train  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from utils import BEST_CHECKPOINT  # noqa: E402

NETWORK = "--features 16 32 64 96 128 128"
STAGES = {
    "cpu": [
        f"{NETWORK} --epochs 4",
        "--image-height 320 --image-width 480 --batch-size 8 --lr 5e-3 --epochs 6",
    ],
    "gpu": [
        f"{NETWORK} --epochs 8",
        "--image-height 640 --image-width 960 --batch-size 8 --lr 5e-3 --epochs 20",
    ],
}


def main(argv=None):
    """Train all stages, as the flags in argv say; returns the exit code."""
    parser = Parser(prog="recipe.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stages", choices=tuple(STAGES), default="cpu", help="see STAGES in it")
    parser.add_argument("--output-dir", default="runs/recipe", type=Path, help="for all files")
    args, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    stages, start = STAGES[args.stages], []
    for number, stage in enumerate(stages, start=1):
        folder = args.output_dir / (f"stage{number}" if number < len(stages) else "")
        print(f"Stage {number} of {len(stages)}: {stage}", flush=True)
        stage = ["--recipe", "better", *stage.split(), *start, *flags, "--load-model"]
        if code := train.main([*stage, "--output-dir", str(folder)]):
            print("The same command of recipe.py goes on with this stage and the rest of them")
            return code
        start = ["--pretrained", str(folder / BEST_CHECKPOINT)]
    return 0


if __name__ == "__main__":
    run_script(main)
