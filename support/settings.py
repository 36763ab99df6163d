"""The settings of a run: a dataclass whose fields are flags; from flags, checkpoint, constants."""

import argparse
import dataclasses
import math
import os
import typing

from support.command_line import Parser, number_between, regular_expression, whole_number
from support.errors import BadInput
from support.images import MAX_CLASSES

FOLDERS = {  # the settings that name photos, and what they are called under --data-dir
    "train_img_dir": "train_images",
    "train_mask_dir": "train_masks",
    "val_img_dir": "val_images",
    "val_mask_dir": "val_masks",
}
HELD_OUT = {"val_img_dir": None, "val_mask_dir": None}  # validation is split from training


def class_names(words):
    """The names of classes: as given, or where that is a number, of so many. Raises BadInput."""
    words = [words] if isinstance(words, (str, int)) else list(words)
    number = len(words) == 1 and str(words[0]).isdecimal()
    count = int(words[0]) if number else len(words)
    if not 1 <= count <= MAX_CLASSES or len(set(words)) < len(words):
        given = f"{count} classes, or two of one name"
        raise BadInput("--classes", given, f"name 1 to {MAX_CLASSES} different ones")
    if number:
        words = ["object"] if count == 1 else range(1, count + 1)
    return tuple(map(str, words))


def flag(default, help, *names, group=None, least=1, most=10**9, saved=True, **options):
    """A field of a frozen dataclass of settings that is a flag of the same name too.

    `names` are shorter ones, `group` the heading in --help of this and those after it, `least` and
    `most` bounds of a whole number, `options` argparse's own; `saved` is False for what belongs to
    one call of the script and not to the run."""
    default = tuple(default) if isinstance(default, list) else default
    facts = {"help": help, "names": names, "group": group, "saved": saved, "options": options}
    return dataclasses.field(default=default, metadata=facts | {"bounds": (least, most)})


def get_args_parser(settings, prog):
    """Every field of the dataclass as a flag; one that is not given leaves no trace."""
    about = f"The defaults are the constants at the top of {prog}."
    parser = group = Parser(prog=prog, description=about, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(settings):
        facts, default, options = field.metadata, field.default, dict(field.metadata["options"])
        kinds = typing.get_args(field.type) or (field.type,)
        if facts["group"]:
            group = parser.add_argument_group(facts["group"])
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif int in kinds:
            options |= {"type": whole_number(*facts["bounds"]), "metavar": "N"}
        elif float in kinds:
            options |= {"type": number_between(0, math.inf), "metavar": "X"}
        elif field.name.endswith("_dir"):
            options["metavar"] = "DIR"
        elif field.name == "group":
            options["type"] = regular_expression
        if typing.get_origin(field.type) is tuple:
            many = default if isinstance(default, tuple) else (default,)
            options["nargs"], default = "+", " ".join(map(str, many)) or None
        elif "const" in options:
            options |= {"nargs": "?", "metavar": "FILE"}
        name = "--" + field.name.replace("_", "-")
        help = facts["help"] + (f" (default: {default})" if default is not None else "")
        group.add_argument(name, *facts["names"], help=help, **options)
    parser.add_argument("--data-dir", metavar="DIR", help="the four folders of photos under DIR")
    return parser


def parse(parser, argv):
    """{name: value} of the flags in argv, several values as a tuple. Raises BadInput."""
    given = vars(parser.parse_args([str(word) for word in argv]))
    if "classes" in given:
        given["classes"] = class_names(given["classes"])
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def read_flags(parser, argv):
    """{name: value} of the settings that flags give, paths in full. Raises BadInput."""
    given = parse(parser, argv)
    if {"step_size", "gamma"} & given.keys() and given.setdefault("scheduler", "step") != "step":
        raise BadInput("--step-size, --gamma", "belong to --scheduler step", "leave them out")
    for name in given:
        if name == "pretrained" or name.endswith("_dir"):
            given[name] = os.path.abspath(given[name])
    if data_dir := given.pop("data_dir", None):
        folders = {name: os.path.join(data_dir, folder) for name, folder in FOLDERS.items()}
        return folders | ({} if os.path.isdir(folders["val_img_dir"]) else HELD_OUT) | given
    # Photos of the user's own are not validated on whatever lies in data/val_images.
    return (HELD_OUT if "train_img_dir" in given else {}) | given


def parse_value(parser, field, value):
    """A setting that does not come from the shell, as its flag would have it. Raises BadInput."""
    name, flag = field.name, "--" + field.name.replace("_", "-")
    if value == () or value == [] or value is None and type(None) in typing.get_args(field.type):
        return value
    if isinstance(value, bool):
        return parse(parser, [flag if value else flag.replace("--", "--no-")])[name]
    return parse(parser, [flag, *(value if isinstance(value, (list, tuple)) else [value])])[name]


def choose_settings(settings, parser, given, start, checkpoint, source):
    """Each setting as its flag gives it, else as an edited constant, else as the checkpoint has it,
    else as in `start`, else as the constant. Network and size are those of `source`, a checkpoint
    too. Says in a line what is another than the checkpoint's. Raises BadInput."""
    constants, saved, edited = {}, {}, {}
    settings_then, constants_then = (checkpoint.get(n, {}) for n in ("settings", "constants"))
    for field in dataclasses.fields(settings):
        name, constant = field.name, parse_value(parser, field, field.default)
        constants[name] = constant
        try:
            if field.metadata["saved"] and name in settings_then:
                saved[name] = parse_value(parser, field, settings_then[name])
            if parse_value(parser, field, constants_then.get(name, constant)) != constant:
                edited[name] = constant
        except BadInput as problem:
            # No other optimizer suits the learning rate that goes on with it.
            if name == "optimizer" and name in settings_then and name not in saved | given:
                why = f"the checkpoint's {settings_then[name]} is not offered any more"
                remedy = "choose one and its --lr, or start from the weights: --pretrained FILE"
                raise BadInput("--optimizer", why, remedy) from None
            counts = (saved | given).get(name, constant)
            print(f"The checkpoint's {name} is not offered, so {counts} counts ({problem.reason})")
    network, fixed, changes = {}, {}, edited | given
    if source:
        height, width = source["image_size"]
        network = {"image_height": height, "image_width": width, "crop": source["crop"] or 0}
        fixed = {name: source["model"][name] for name in ("in_channels", "features")}
        fixed["features"] = tuple(fixed["features"])
    if checkpoint:
        fixed["classes"] = tuple(checkpoint["classes"])
    network |= fixed
    for name in fixed:
        if changes.get(name, fixed[name]) != fixed[name]:
            reason = f"the checkpoint's network has {fixed[name]}"
            raise BadInput("--" + name.replace("_", "-"), reason, "leave it out, or start afresh")
    for name, value in changes.items():
        before = (saved | network).get(name, value) if checkpoint else value
        if value != before:
            print(f"{name}: {value}, as given, instead of the checkpoint's {before}")
    return settings(**constants | start | saved | network | changes)
