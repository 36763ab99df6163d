"""From constants, flags and a checkpoint to the settings of a run of train.py."""

import argparse
import os
from pathlib import Path

from augment import AUGMENTATIONS
from checkpoints import SHIPPED, short
from command_line import Parser, above_zero, auto_or_threshold, fraction, from_zero, whole
from files import BadInput, printable, shown
from losses import LOSSES

FOLDERS = {  # and what they are called under --data-dir
    "train_img_dir": "train_images",
    "train_mask_dir": "train_masks",
    "val_img_dir": "val_images",
    "val_mask_dir": "val_masks",
}
OPTIONAL = (  # constants that may be None
    "VAL_IMG_DIR",
    "VAL_MASK_DIR",
    "CACHE_DIR",
    "NUM_WORKERS",
    "PRETRAINED",
    "TENSORBOARD",
)
PATHS = (*FOLDERS, "data_dir", "output_dir", "cache_dir", "pretrained", "tensorboard")
NOT_SAVED = (  # settings of one call, not of the run
    "load_model",
    "output_dir",
    "cache_dir",
    "device",
    "pretrained",
    "tensorboard",
)
ROOT = Path(__file__).resolve().parent
EMA = 0.998  # what --ema means without a number


def get_args_parser(constants, given_only=False):
    """Every constant of train.py as a flag of its name, some with a shorter one too.

    With `given_only`, flags that are not given leave no trace in what is parsed.
    """
    parser = Parser(
        prog="train.py",
        description="Train the U-Net. The defaults are the constants at the top of train.py.",
    )

    def flag(group, constant, help, *aliases, **kwargs):
        name = "--" + constant.lower().replace("_", "-")
        default = constants[constant]
        check_constant(constant, default, **kwargs)
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            help += f" (default: {shown})"
        kwargs |= {"default": argparse.SUPPRESS if given_only else default, "help": help}
        group.add_argument(name, *aliases, dest=constant.lower(), **kwargs)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="the four folders below under DIR",
    )
    flag(group, "TRAIN_IMG_DIR", "training photos", metavar="DIR")
    flag(group, "TRAIN_MASK_DIR", "their masks", metavar="DIR")
    flag(group, "VAL_IMG_DIR", "validation photos; without, cars are held out", metavar="DIR")
    flag(group, "VAL_MASK_DIR", "their masks", metavar="DIR")
    flag(group, "IMAGE_HEIGHT", "photos are scaled to it", type=whole(1, 16384), metavar="N")
    flag(group, "IMAGE_WIDTH", "photos are scaled to it", type=whole(1, 16384), metavar="N")
    flag(group, "CACHE", "keep decoded photos on disk", action=argparse.BooleanOptionalAction)
    flag(group, "CACHE_DIR", "where to keep them: .cache beside the photos' folder", metavar="DIR")
    flag(
        group,
        "NUM_WORKERS",
        "processes that load data: one a core for a GPU, none on a CPU",
        type=whole(0, 1024),
        metavar="N",
    )

    flag(group, "AUGMENT", "see augment.py", choices=tuple(AUGMENTATIONS))

    group = parser.add_argument_group("network")
    flag(group, "FEATURES", "channels of each level", type=whole(1, 8192), nargs="+", metavar="N")
    flag(group, "IN_CHANNELS", "3 for RGB, 1 for grey", type=int, choices=(1, 3))
    flag(
        group,
        "PRETRAINED",
        f"start from the weights in FILE; without FILE, from {SHIPPED}",
        nargs="?",
        const=str(ROOT / SHIPPED),
        metavar="FILE",
    )

    group = parser.add_argument_group("training")
    flag(
        group, "NUM_EPOCHS", "passes over the photos", "--epochs", type=whole(1, 10**6), metavar="N"
    )
    flag(group, "BATCH_SIZE", "photos a step", "--batchsize", type=whole(1, 65536), metavar="N")
    flag(group, "LOSS", "see losses.py", choices=tuple(LOSSES))
    flag(group, "OPTIMIZER", "with PyTorch's defaults", choices=("adam", "adamw", "sgd"))
    flag(group, "LEARNING_RATE", "the highest", "--lr", type=above_zero, metavar="X")
    flag(
        group,
        "SCHEDULER",
        "how the learning rate changes: not, in steps, falling, rising and falling",
        choices=("none", "step", "cosine", "onecycle"),
    )
    flag(
        group,
        "STEP_SIZE",
        "multiply the learning rate by --gamma after so many epochs; means --scheduler step",
        "--stepsize",
        type=whole(1, 10**6),
        metavar="N",
    )
    flag(group, "GAMMA", "see --step-size; likewise", type=above_zero, metavar="X")
    flag(
        group,
        "EMA",
        "decay of the exponential moving average of the weights that is then evaluated and kept; "
        f"without X, {EMA}; 0: the weights themselves",
        nargs="?",
        const=EMA,
        type=fraction,
        metavar="X",
    )
    flag(group, "CLIP_GRAD", "clip the gradients' norm; 0: not", type=from_zero, metavar="X")
    flag(
        group,
        "THRESHOLD",
        "a pixel is object above this probability; auto: that with the best validation Dice",
        type=auto_or_threshold,
        metavar="X",
    )
    flag(
        group,
        "ACCUMULATE",
        "batches whose gradients make one step",
        type=whole(1, 65536),
        metavar="N",
    )
    flag(
        group,
        "CHECKPOINT_ACTIVATIONS",
        "less memory, more time",
        action=argparse.BooleanOptionalAction,
    )
    flag(
        group,
        "SYNC_BATCHNORM",
        "on several GPUs: statistics over the photos of all",
        action=argparse.BooleanOptionalAction,
    )
    flag(
        group,
        "COMPILE",
        "torch.compile, for long runs",
        action=argparse.BooleanOptionalAction,
    )
    flag(group, "SEED", "of weights, order and augmentation", type=whole(0, 2**32 - 1), metavar="N")

    group = parser.add_argument_group("run")
    flag(
        group,
        "LOAD_MODEL",
        "go on where the last run stopped",
        action=argparse.BooleanOptionalAction,
    )
    flag(
        group,
        "SAVE_EVERY",
        "save within an epoch too, after so many steps, while that takes below a twentieth of the "
        "time; 0: only after each epoch and when stopped",
        type=whole(0, 10**9),
        metavar="N",
    )
    flag(group, "OUTPUT_DIR", "where checkpoints, metrics.csv and pictures go", metavar="DIR")
    flag(
        group,
        "TENSORBOARD",
        "write TensorBoard's events too; without DIR, into runs/ of the output folder",
        nargs="?",
        const="",
        metavar="DIR",
    )
    flag(group, "DEVICE", "cuda, mps or cpu; auto: the first of them that is there")
    flag(group, "PIN_MEMORY", "faster copies to CUDA", action=argparse.BooleanOptionalAction)
    return parser


def check_constant(name, value, type=str, nargs=None, choices=None, action=None, **_):
    """Hold an edited constant, or a checkpoint's setting, to what its flag would be held to.

    Raises argparse.ArgumentTypeError.
    """
    if value is None and name in OPTIONAL:
        return
    try:
        if value is None or nargs == "+" and not value:
            raise argparse.ArgumentTypeError("it needs a value")
        if action is argparse.BooleanOptionalAction:
            if not isinstance(value, bool):
                raise argparse.ArgumentTypeError(f"{value} is neither True nor False")
            return
        if nargs == "+" and not isinstance(value, (tuple, list)):
            raise argparse.ArgumentTypeError(f"{value} is no tuple")
        for part in value if nargs == "+" else [value]:
            part = plain(part)
            if type(str(part)) != part:
                raise argparse.ArgumentTypeError(f"{part!r} is of another type")
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{value} is not among {choices}")
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{name} = {short(value)}: {error}") from None


def read_flags(constants, argv):
    """(constants, given): all settings as the constants have them, and those the user typed."""
    try:
        defaults = vars(get_args_parser(constants).parse_args([]))
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"train.py: {error}: edit the constant") from None
    given = vars(get_args_parser(constants, given_only=True).parse_args(argv))
    for side in ("train", "val"):
        if (f"{side}_img_dir" in given) != (f"{side}_mask_dir" in given):
            raise BadInput(f"--{side}-img-dir and --{side}-mask-dir belong together: name both")
    for name in {"step_size", "gamma"} & set(given):
        if given.setdefault("scheduler", "step") != "step":
            flag = "--" + name.replace("_", "-")
            raise BadInput(
                f"{flag}: belongs to --scheduler step, not {given['scheduler']}: leave one out"
            )
    for name in PATHS:
        if given.get(name):
            given[name] = os.path.abspath(given[name])

    if data_dir := given.pop("data_dir", None):
        folders = {name: os.path.join(data_dir, folder) for name, folder in FOLDERS.items()}
        if not os.path.isdir(folders["val_img_dir"]):
            folders |= {"val_img_dir": None, "val_mask_dir": None}
        given = folders | given
    elif "train_img_dir" in given:
        # Photos of the user's own are not validated on whatever lies in data/val_images.
        given = {"val_img_dir": None, "val_mask_dir": None} | given
    return {name: plain(value) for name, value in defaults.items()}, given


def plain(value):
    """A constant as the checkpoint gives it back: tuples as lists, paths as text."""
    if isinstance(value, tuple):
        return list(value)
    return os.fspath(value) if isinstance(value, Path) else value


def choose_settings(defaults, start, given, checkpoint, pretrained=None, filename=None):
    """All settings: as given, else as the checkpoint has them, else as `start` or the constants do.

    Of `pretrained`, a checkpoint too, they take only network and size. A constant edited since the
    checkpoint was written counts as given. Raises BadInput where the network cannot be the
    checkpoint's.
    """
    if checkpoint is None and pretrained is None:
        return argparse.Namespace(**defaults | start | given)
    if checkpoint is None:
        network = network_of(pretrained)
        check_network(given, network, "--pretrained")
        return argparse.Namespace(**defaults | start | network | given)

    saved = start | saved_settings(checkpoint, defaults, filename) | network_of(checkpoint)
    before = checkpoint.get("constants", defaults)
    edited = {name: value for name, value in defaults.items() if value != before.get(name, value)}
    changes = edited | given
    check_network(changes, saved, "--load-model")
    for name, value in changes.items():
        if value is not None and value != saved.get(name, value):
            both = f"{value}, as given, instead of the checkpoint's {saved[name]}"
            print(f"{name}: {printable(both)}")
    return argparse.Namespace(**defaults | saved | changes)


def saved_settings(checkpoint, defaults, filename):
    """The settings that a checkpoint holds; {} of a classic one. Raises BadInput."""
    try:
        known = defaults.keys() - set(NOT_SAVED)
        settings = {k: v for k, v in checkpoint.get("settings", {}).items() if k in known}
        constants = checkpoint.get("constants", {})
        if not isinstance(constants, dict):
            raise ValueError(f"constants are {short(constants)}")
        for name, value in (*settings.items(), *constants.items()):
            parts = value if isinstance(value, list) else [value]
            plainly = all(v is None or isinstance(v, (str, int, float)) for v in parts)
            if len(parts) > 64 or not plainly:
                raise ValueError(f"{name} is {short(value)}")
        get_args_parser({k.upper(): v for k, v in (defaults | settings).items()})
    except (AttributeError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise BadInput(
            f"{shown(filename)}: its settings make no sense ({printable(error)}): leave "
            "--load-model out to start afresh"
        ) from None
    return settings


def network_of(checkpoint):
    """The settings that a checkpoint's network and its photos had."""
    height, width = checkpoint["image_size"]
    return {
        "image_height": height,
        "image_width": width,
        "features": checkpoint["model"]["features"],
        "in_channels": checkpoint["model"]["in_channels"],
    }


def check_network(changes, saved, because_of):
    """Raises BadInput where a network other than that of the flag's checkpoint is asked for."""
    for name in ("features", "in_channels"):
        if changes.get(name, saved[name]) != saved[name]:
            flag = "--" + name.replace("_", "-")
            both = changes[name], saved[name]
            wanted, found = (str(value).strip("[]").replace(",", "") for value in both)
            raise BadInput(
                f"{flag} {wanted}: the checkpoint's network has {found}: leave {flag} out to go on "
                f"with it, or leave {because_of} out to start afresh"
            )
