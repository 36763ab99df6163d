"""Train by the recipe of docs/results.md: on small photos first, which is quick, then larger ones.

    python tools/recipe.py                                          into runs/recipe
    python tools/recipe.py --data-dir DIR --output-dir runs/mine    all flags of train.py

Each stage is a training of train.py that starts from the best weights of the one before. The last
one's files are in the output folder itself, the others' in stage1/, stage2/, ... in it. Stopped,
the same command goes on where it was; other photos or flags need another --output-dir.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

import train  # noqa: E402
import utils  # noqa: E402
from dataset import split_by_car  # noqa: E402
from support import distributed  # noqa: E402
from support.command_line import Parser, arguments, run_script  # noqa: E402
from support.errors import BadInput, display_path, short_path  # noqa: E402
from support.flags import check  # noqa: E402
from support.pairs import pair_up  # noqa: E402
from support.settings import read_flags  # noqa: E402

MAX_EPOCHS = 50  # of a stage, where photos are few


@dataclass(frozen=True)
class Stage:
    """A training at one size of photos: flags of train.py, and for how many photos it goes on."""

    flags: str
    n_photos: int


@dataclass(frozen=True)
class Recipe:
    """Trainings of one network, each from the best weights of the one before."""

    network: str  # flags of train.py
    stages: tuple[Stage, ...]


WIDE = "--features 16 32 64 96 128 128"
NARROW = "--features 8 16 32 64 96 96"
SMALL = "--image-height 160 --image-width 240 --batch-size 16"
MEDIUM = "--image-height 320 --image-width 480 --batch-size 8 --lr 5e-3"
MEDIUM_LONGER = "--image-height 320 --image-width 480 --batch-size 8 --lr 8e-3"
LARGE = "--image-height 640 --image-width 960 --batch-size 8 --lr 5e-3"
LARGE_SMALL_BATCHES = "--image-height 640 --image-width 960 --batch-size 4 --lr 4e-3"
RECIPES = {
    "gpu": Recipe(WIDE, (Stage(SMALL, 36_000), Stage(LARGE, 54_000))),
    "bfloat16": Recipe(WIDE, (Stage(SMALL, 12_500), Stage(MEDIUM, 19_000))),
    "long": Recipe(
        WIDE,
        (
            Stage(SMALL, 12_500),
            Stage(MEDIUM, 19_000),
            Stage(MEDIUM_LONGER, 31_000),
            Stage(LARGE_SMALL_BATCHES, 10_500),
        ),
    ),
    "float32": Recipe(NARROW, (Stage(SMALL, 9_000), Stage(MEDIUM, 12_500))),
}


def get_args_parser():
    """The flags of recipe.py itself."""
    about = f"{__doc__.splitlines()[0]} All other flags are train.py's, --output-dir runs/recipe."
    parser = Parser(prog="recipe.py", description=about, allow_abbrev=False)
    parser.add_argument(
        "--stages", choices=tuple(RECIPES), help="which recipe (default: by device, never long)"
    )
    return parser


def choose_recipe(name, device):
    """The recipe of this name or, without one, that of the device."""
    precision = "bfloat16" if utils.amp_dtype(device) else "float32"
    return RECIPES[name or ("gpu" if device.type == "cuda" else precision)]


def count_training_photos(from_flags):
    """How many photos train.py would train on with these flags. Raises BadInput."""
    settings = check(train.Settings, train.settings_from_data(from_flags) | from_flags)
    folders = (settings.train_img_dir, settings.train_mask_dir)
    pairs, _ = pair_up(*(train.ROOT / folder for folder in folders), settings.mask_suffix)
    has_validation = settings.val_img_dir and (train.ROOT / settings.val_img_dir).exists()
    return len(pairs if has_validation else split_by_car(pairs, group=settings.group)[0])


def main(argv=None):
    """Train all stages, as the flags in argv say; returns the exit code."""
    argv = arguments(argv)
    args, flags = get_args_parser().parse_known_args(argv)
    from_flags = read_flags(train.Settings, flags)
    output = Path(from_flags.get("output_dir", train.ROOT / "runs" / "recipe"))
    device = utils.pick_device(check(train.Settings, from_flags).device, tune=False)
    recipe = choose_recipe(args.stages, device)
    folders = [output / f"stage{number}" for number in range(1, len(recipe.stages))] + [output]
    before_last = folders[-2] / utils.BEST_CHECKPOINT
    if (output / utils.CHECKPOINT).exists() and not before_last.exists():
        raise BadInput(output / utils.CHECKPOINT, "is of another run", "name an --output-dir")

    with distributed.process_group(device):
        n_photos = count_training_photos(from_flags)
        start = [] if "pretrained" in from_flags else shlex.split(recipe.network)
        for folder, stage in zip(folders, recipe.stages, strict=True):
            epochs = min(max(1, round(stage.n_photos / n_photos)), MAX_EPOCHS)
            words = ["--recipe", "better", *start, *shlex.split(stage.flags)]
            words += ["--epochs", str(epochs), *flags]
            words += ["--output-dir", str(folder), "--load-model"]
            with distributed.first_before_others():  # it wrote what they start from
                print(f"Stage in {display_path(folder)}: train.py {shlex.join(words)}", flush=True)
            code = train.main(words, resume_command=[short_path(__file__), *argv])
            if code:
                return code
            start = ["--pretrained", str(folder / utils.BEST_CHECKPOINT)]
    return 0


if __name__ == "__main__":
    run_script(main)
