"""From flags, edited constants and a checkpoint to the settings of a run."""

import dataclasses
import os

from support.errors import BadInput
from support.flags import check, flag_name, flag_of, get_args_parser

FOLDERS = {  # the settings that name folders, and the folders' names under --data-dir
    "train_img_dir": "train_images",
    "train_mask_dir": "train_masks",
    "val_img_dir": "val_images",
    "val_mask_dir": "val_masks",
}
SHIPPED = {  # the constants of train.py that a recipe or the demo replaces, unless edited
    "learning_rate": 1e-4,
    "batch_size": 16,
    "num_epochs": 10,
    "image_height": 160,
    "image_width": 240,
    "features": (64, 128, 256, 512),
}
HELD_OUT = {"val_img_dir": None, "val_mask_dir": None}  # validation is split from training

# Flags and folders --------------------------------------------------------------------------------


def read_flags(settings_class, argv, prog="train.py"):
    """{name: value} of the settings that flags in argv give, paths in full. Raises BadInput."""
    words = [str(word) for word in argv]
    given = vars(get_args_parser(settings_class, prog).parse_args(words))
    data_dir = given.pop("data_dir", None)
    checked = check(settings_class, given)
    given = {name: getattr(checked, name) for name in given}
    for name in given.keys() & {"step_size", "gamma"}:
        if given.setdefault("scheduler", "step") != "step":
            raise BadInput(flag_name(name), "belongs to --scheduler step", "leave it out")
    for name in given:
        if name == "pretrained" or name.endswith("_dir"):
            given[name] = os.path.abspath(given[name])
    if ("val_img_dir" in given) != ("val_mask_dir" in given):
        raise BadInput("--val-img-dir and --val-mask-dir", "belong together", "name both")
    return folders_from_flags(given, data_dir) | given


def folders_from_flags(given, data_dir):
    """{name: folder} of the settings that --data-dir, or --train-img-dir, means for others."""
    if data_dir:
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
        folders = {name: os.path.join(data_dir, folder) for name, folder in FOLDERS.items()}
        return folders if os.path.isdir(folders["val_img_dir"]) else folders | HELD_OUT
    # The user's own photos are not validated on whatever lies in data/val_images.
    return HELD_OUT if "train_img_dir" in given else {}


def existing_photos(defaults, from_flags, root):
    """{name: value} of settings that follow from which photos there are.

    None if no flag names photos and none of the default folders, under root, exists yet.
    """
    there = [name for name in FOLDERS if (root / (getattr(defaults, name) or "no")).exists()]
    if FOLDERS.keys() & from_flags.keys() or "val_img_dir" in there:
        return {}
    if there or defaults.train_img_dir != "data/train_images":
        return HELD_OUT
    return None


# Which source of a value counts -------------------------------------------------------------------


def choose_settings(settings_class, recipes, from_flags, from_photos, checkpoint, pretrained):
    """Settings of a run, each from the source that counts.

    Args:
        recipes: {name: {setting: value}}.
        from_flags: {setting: value} that read_flags gave.
        from_photos: {setting: value} that follow from which photos there are, as for the demo.
        checkpoint: the run's own checkpoint, which load_checkpoint gave; {} for a new run.
        pretrained: the checkpoint whose weights a new run starts from; {} for none.

    Prints a line for each value that differs from the checkpoint's. Raises BadInput.
    """
    defaults = dataclasses.asdict(check(settings_class, {}))
    from_start = {}
    if "settings" not in checkpoint:
        recipe = (defaults | from_photos | from_flags)["recipe"]
        from_start = recipes[recipe] | from_photos
    from_checkpoint = saved_settings(settings_class, checkpoint, from_flags)
    from_checkpoint |= network_settings(checkpoint, pretrained)
    edited_constants = find_edited(settings_class, checkpoint.get("constants", SHIPPED), defaults)
    # A flag counts first, then an edited constant, the checkpoint, recipe or demo, the default.
    values = defaults | from_start | from_checkpoint | edited_constants | from_flags
    chosen = check(settings_class, values)
    check_together(chosen, from_flags)
    check_network(chosen, checkpoint, pretrained)
    print_changes(chosen, from_checkpoint, edited_constants | from_flags if checkpoint else {})
    if "recipe" in from_photos:  # which only the demo's settings name
        print_demo(chosen, from_start)
    return chosen


def print_changes(chosen, from_checkpoint, changes):
    """Print a line for each setting that differs from the checkpoint's."""
    for name in changes:
        before = from_checkpoint.get(name, getattr(chosen, name))
        if before != getattr(chosen, name):
            print(f"{name}: {getattr(chosen, name)}, instead of the checkpoint's {before}")


def print_demo(chosen, from_demo):
    """Print the demo's settings that count."""
    own = [
        f"{name} {value}"
        for name, value in from_demo.items()
        if name not in FOLDERS and value == getattr(chosen, name)
    ]
    listed = ", ".join(own)
    print(f"Training on the demo set in data/demo with its own settings: {listed}")


def check_together(chosen, from_flags):
    """Raises BadInput for settings that are right each by itself, but not together."""
    if from_flags.keys() & {"image_height", "image_width"} and chosen.crop:
        reason = f"--crop {chosen.crop} trains on squares of photos that are not scaled"
        raise BadInput("--image-height and --image-width", reason, "leave them out, or --crop 0")
    if bool(chosen.val_img_dir) != bool(chosen.val_mask_dir):
        raise BadInput("VAL_IMG_DIR and VAL_MASK_DIR", "belong together", "set both, or neither")
    smallest = 2 ** (len(chosen.features) + 1)  # leaves 2x2 pixels at the bottom, for BatchNorm
    if min(chosen.size) < smallest:
        reason = f"{len(chosen.features)} levels of --features need at least {smallest}"
        raise BadInput("--image-height, --image-width, --crop", reason, "name larger ones")


def saved_settings(settings_class, checkpoint, from_flags):
    """{name: value} of a checkpoint's settings. What is no longer offered is left out, with a line.

    Raises BadInput if the optimizer is no longer offered and no flag names another one, since the
    checkpoint's learning rate suits no other.
    """
    kept = {}
    saved = checkpoint.get("settings", {})
    for name, field in settings_class.__pydantic_fields__.items():
        if name not in saved or not flag_of(field).saved:
            continue
        try:
            kept[name] = getattr(check(settings_class, {name: saved[name]}), name)
        except BadInput as problem:
            if name == "optimizer" and name not in from_flags:
                remedy = "choose one and its --lr, or start from the weights: --pretrained FILE"
                raise BadInput("the checkpoint's optimizer", problem.reason, remedy) from None
            print(f"The checkpoint's {name} does not count: it {problem.reason}")
    return kept


def find_edited(settings_class, constants, defaults):
    """{name: value} of the defaults that have been edited since they were these constants."""
    edited = {}
    for name, then in constants.items():
        if name not in defaults:
            continue
        try:
            then = getattr(check(settings_class, {name: then}), name)
        except BadInput:  # no longer offered, so it is no longer the default either
            continue
        if then != defaults[name]:
            edited[name] = defaults[name]
    return edited


def network_settings(checkpoint, pretrained):
    """{name: value} of the settings that the network of a checkpoint determines."""
    network = checkpoint or pretrained
    if not network:
        return {}
    settings = {
        "in_channels": network["model"]["in_channels"],
        "features": tuple(network["model"]["features"]),
        "crop": network["crop"] or 0,
    }
    if not network["crop"]:
        settings["image_height"], settings["image_width"] = network["image_size"]
    if checkpoint:
        settings["classes"] = tuple(checkpoint["classes"])
    return settings


def check_network(chosen, checkpoint, pretrained):
    """Raises BadInput if chosen settings do not fit the network that weights come from."""
    expected = network_settings(checkpoint, pretrained)
    for name in expected.keys() & {"in_channels", "features", "classes"}:
        if getattr(chosen, name) != expected[name]:
            reason = f"the checkpoint's network has {expected[name]}"
            raise BadInput(flag_name(name), reason, "leave it out, or start afresh")
