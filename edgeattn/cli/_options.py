"""Options that several commands share, spelt once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import click

if TYPE_CHECKING:
    from edgeattn.core.numerics import Array

_JOB: tuple[Callable[..., Any], ...] = (
    click.argument("model"),
    click.option(
        "--target", "-t", help="What it is made for; see edgeattn targets. [default: the device's best, or onnx]"
    ),
    click.option("--precision", "-p", default="fp32", show_default=True, help="fp32, fp16, ...; see edgeattn targets."),
    click.option("--device", "-d", help="The device it is for; see edgeattn devices."),
    click.option("--option", "-O", "options", multiple=True, metavar="NAME=CHOICE", help="Of the target; see targets."),
    click.option("--strict", is_flag=True, help="Refuse to keep operations in float32 that the precision would break."),
    click.option("--calibration", metavar="SOURCE", help="Images, .npy, .npz or module:function to measure on."),
    click.option("--samples", type=int, help="Calibration samples at most. [default: the recipe's, or 128]"),
    click.option("--keep", multiple=True, metavar="MODULE", help="A module, or a glob of them, that stays in floats."),
    click.option("--layout", default="nchw", show_default=True, help="Of image inputs: nchw as in PyTorch, or nhwc."),
)

_MODEL: tuple[Callable[..., Any], ...] = (
    click.option(
        "--input",
        "-i",
        "inputs",
        multiple=True,
        metavar="NAME=SHAPE[:DTYPE[:LOW..HIGH]]",
        help="An input, as x=1x3x224x224 or ids=1x16:int64:0..31999; 1..8 or 1..4..8 is a dimension that may vary, "
        "from min (over opt) to max, 192..224..256/32 one in steps of 32. Once for each.",
    ),
    click.option("--checkpoint", "-c", type=click.Path(), help=".safetensors, or .pth read without executing it."),
    click.option("--arg", "-a", "args", multiple=True, metavar="NAME=VALUE", help="An argument of the factory."),
)


def _apply(options: tuple[Callable[..., Any], ...], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--input, --checkpoint, --arg."""
    return _apply(_MODEL, function)


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL, --target, --precision, --device and the model's options."""

    @functools.wraps(function)
    def parsed(options: tuple[str, ...], **given: Any) -> Any:
        return function(options=_pairs(options, "--option"), **given)

    return _apply(_JOB, model_options(parsed))


def _pairs(texts: tuple[str, ...], hint: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=hint)
        pairs[name] = value
    return pairs


def parse_args(texts: tuple[str, ...]) -> dict[str, Any]:
    """``NAME=VALUE`` texts; values are numbers, true or false where they read as such, else text."""
    import json

    parsed: dict[str, Any] = {}
    for name, value in _pairs(texts, "--arg").items():
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def read_feeds(texts: tuple[str, ...], option: str) -> dict[str, Array]:
    """Arrays by name from ``NAME=FILE.npy``; no code in a file is run.

    Raises:
        UsageError: another form, or a file that holds no single array.
    """
    import numpy as np

    from edgeattn.core.errors import UsageError

    feeds: dict[str, Any] = {}
    for text in texts:
        name, _, file = text.partition("=")
        try:
            feeds[name] = np.load(file, allow_pickle=False)
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError("an input cannot be read", value=text, where=option, why=why) from error
        except (ValueError, EOFError) as error:
            why, fix = "it is no whole .npy file of numbers", "use numpy.save"
            raise UsageError("an input cannot be read", value=text, where=option, why=why, fix=fix) from error
        if not isinstance(feeds[name], np.ndarray):
            why = "it holds several arrays"
            raise UsageError("an input cannot be read", value=text, where=option, why=why, fix="use numpy.save")
    return feeds


@overload
def output_file(output: str, *kinds: str) -> Path: ...
@overload
def output_file(output: None, *kinds: str) -> None: ...
def output_file(output: str | None, *kinds: str) -> Path | None:
    """The file of ``--output``, whose folder can be written; looked at before the work, not after.

    Args:
        kinds: suffixes that there are, the usual one first.

    Raises:
        UsageError: another suffix, a folder in its place, or a folder that cannot be written.
    """
    from edgeattn.core.errors import UsageError
    from edgeattn.core.files import check_writable

    if output is None:
        return None
    file = Path(output)
    if file.suffix.lower() not in kinds:
        fix = f"--output {file.with_suffix(kinds[0]) if file.name else 'file' + kinds[0]}"
        raise UsageError(f"it is written as {' or '.join(kinds)}", value=output, where="--output", fix=fix)
    if file.is_dir():
        raise UsageError("the file cannot be written", value=output, where="--output", why="a folder is in its place")
    check_writable(file.resolve().parent)
    return file
