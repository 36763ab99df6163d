"""Fields of a settings class that are flags at the same time, checked by pydantic.

A settings class is a frozen pydantic dataclass whose fields are made by `setting`. Every value is
checked in the same way, whether it is a default, a flag or part of a checkpoint.
"""

import argparse
import dataclasses
import os
import typing
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from support.command_line import Parser, regular_expression
from support.errors import BadInput, printable
from support.masks import MAX_CLASSES

STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

# Types of settings --------------------------------------------------------------------------------


def group_pattern(text):
    """The text, if it is a regular expression with a group. Raises ValueError."""
    try:
        return regular_expression(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"should be {error}") from None


def class_names(words):
    """The names of classes: as given or, if that is a number, names for that many classes.

    Raises BadInput for too many classes, or two of the same name.
    """
    words = [words] if isinstance(words, (str, int)) else list(words)
    is_number = len(words) == 1 and str(words[0]).isdecimal()
    count = int(words[0]) if is_number else len(words)
    if not 1 <= count <= MAX_CLASSES or len(set(words)) < len(words):
        reason = f"{count} classes, or two of the same name"
        raise BadInput("--classes", reason, f"name 1 to {MAX_CLASSES} different ones")
    if is_number:
        words = ["object"] if count == 1 else range(1, count + 1)
    return tuple(map(str, words))


UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
ClassNames = Annotated[tuple[str, ...], BeforeValidator(class_names)]
Channels = Annotated[Literal[3, 1], BeforeValidator(int)]
GroupPattern = Annotated[str, AfterValidator(group_pattern)]
PixelValue = Annotated[int, Field(ge=0, le=65535)]
Side = Annotated[int, Field(ge=1, le=16384)]  # of an image, in pixels


# Fields that are flags ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a setting's flag needs beside the setting's name, type, default and help.

    Attributes:
        names: further names, such as "--lr".
        group: heading in --help for this flag and those after it.
        saved: whether the value belongs to the run, and so to its checkpoint.
        bare_value: what the flag means without a value; None if it needs one.
    """

    names: tuple = ()
    group: str | None = None
    saved: bool = True
    bare_value: str | None = None


def setting(default, help, *names, group=None, saved=True, bare_value=None, **bounds):
    """A field of a settings class; for the arguments see Flag. Bounds are pydantic's, as `ge=1`."""
    flag = Flag(names, group, saved, bare_value)
    return Field(default, description=help, json_schema_extra={"flag": flag}, **bounds)


def flag_of(field):
    """The Flag of a pydantic field that `setting` made."""
    return field.json_schema_extra["flag"]


def flag_name(name):
    """A setting's flag: "--batch-size" for "batch_size"."""
    return "--" + name.replace("_", "-")


def get_args_parser(settings_class, prog):
    """A parser with a flag for each setting; a flag that is not given leaves no trace."""
    about = f"The defaults are those of {prog}."
    parser = Parser(prog=prog, description=about, argument_default=argparse.SUPPRESS)
    group = parser
    for name, field in settings_class.__pydantic_fields__.items():
        if flag_of(field).group:
            group = parser.add_argument_group(flag_of(field).group)
        add_flag(group, name, field)
    parser.add_argument("--data-dir", metavar="DIR", help="the four folders of photos under DIR")
    return parser


def add_flag(group, name, field):
    """Add a setting's flag to a group of a parser. pydantic checks the words, argparse does not."""
    flag, kind = flag_of(field), field.annotation
    is_tuple = typing.get_origin(kind) is tuple
    options = {"help": field.description + default_text(field.default)}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is typing.Literal:
        options["metavar"] = "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    else:
        options["metavar"] = metavar(name, kind)
    if is_tuple:
        options["nargs"] = "+"
    if flag.bare_value is not None:
        options["nargs"] = "?"
        options["const"] = flag.bare_value
    group.add_argument(flag_name(name), *flag.names, **options)


def default_text(default):
    """A default in --help; nothing for None and for an empty tuple."""
    if default is None or default == ():
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


def metavar(name, kind):
    """What stands for a setting's value in --help."""
    if name.endswith("_dir"):
        return "DIR"
    kinds = list(types_in(kind))
    if int in kinds:
        return "N"
    return "X" if float in kinds else name.rpartition("_")[2].upper()


def types_in(kind):
    """A type and all types in it, such as int in `tuple[int, ...] | None`."""
    yield kind
    for inner in typing.get_args(kind):
        yield from types_in(inner)


def check(settings_class, values):
    """settings_class(**values). Raises BadInput that names the first wrong value's flag."""
    try:
        return settings_class(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        wrong = printable(str(problem["input"])[:100])
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        where = f"{flag_name(problem['loc'][0])} {wrong}"
        raise BadInput(where, reason, "--help lists the flags") from None
