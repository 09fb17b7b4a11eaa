"""Recipes: what to build. A TOML file, or one made up on the spot for a model from outside."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgeattn.core import schema
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.hashing import sha256_data, sha256_file
from edgeattn.core.numerics import Array
from edgeattn.core.specs import DTYPES, LARGEST, Ranges, TensorSpec, dynamic_fault, parse_spec, range_fault

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

#: Names under which a .py file's factory is looked for when none is given.
FACTORY_NAMES = ("factory", "build", "build_model", "create_model", "get_model", "make_model", "model", "Model")


class ModelSpec(schema.Strict):
    """Where the ``nn.Module`` comes from.

    Attributes:
        factory: ``package.module:callable``, ``path/to/file.py:callable`` or ``timm:NAME``.
        args: keyword arguments of the callable.
        checkpoint: .safetensors (or .pth, read without executing it), relative to the recipe file.
    """

    factory: str
    args: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = Field(default=None, min_length=1)

    @field_validator("factory")
    @classmethod
    def _has_both_parts(cls, value: str) -> str:
        if not re.fullmatch(r"[^:]+:[^:]+", value):
            raise ValueError("must be package.module:callable, path/to/file.py:callable or timm:NAME")
        return value


class InputSpec(schema.Strict):
    """Shape, dtype and random range of one input; see ``core.specs.TensorSpec``.

    Attributes:
        dynamic: (min, opt, max), or with a step as a fourth, of the dimensions that may vary, by axis; opt is the
            shape's own number.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    dynamic: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @field_validator("shape")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in value):
            raise ValueError("every dimension must be at least 1")
        if math.prod(value) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} elements")
        return value

    @field_validator("dynamic", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return (
            {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value
        )

    @field_validator("dynamic")
    @classmethod
    def _varies(cls, value: dict[str, tuple[int, ...]], info: ValidationInfo) -> dict[str, tuple[int, ...]]:
        if strange := [axis for axis in value if not axis.isascii() or not axis.isdigit() or axis != str(int(axis))]:
            raise ValueError(f"axis {strange[0]!r}: an axis is a number from 0")
        shape = info.data.get("shape")  # absent where it is wrong itself
        if shape is not None and (fault := dynamic_fault(shape, {int(axis): ends for axis, ends in value.items()})):
            raise ValueError(fault)
        return value

    @model_serializer(mode="wrap")
    def _terse(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ranges as if there were none to give: digests and keys of static recipes stay what they were."""
        data: dict[str, Any] = plain(self)
        if not self.dynamic:
            del data["dynamic"]
        return data

    @property
    def ranges(self) -> Ranges:
        """The dimensions that may vary, as in ``core.specs.TensorSpec``."""
        return tuple(sorted((int(axis), *ends) for axis, ends in self.dynamic.items()))

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _range(self) -> InputSpec:
        if fault := range_fault(self.dtype, self.low, self.high):
            raise ValueError(fault)
        return self


class Preprocess(schema.Strict):
    """From a raw image to the first input: ``(raw * scale - mean) / std`` for each channel of (B, C, H, W).

    Attributes:
        scale: factor on the raw values, such as 1/255.
        mean, std: one value a channel, after scaling.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def preprocessed(raw: Array, preprocess: Preprocess | None) -> Array:
    """Raw values (N, C, ...) as the model takes them, in float32."""
    values = raw.astype(np.float32)
    if preprocess is None:
        return values
    per_channel = (1, -1) + (1,) * (values.ndim - 2)
    mean, std = (np.asarray(v, np.float32).reshape(per_channel) for v in (preprocess.mean, preprocess.std))
    scaled: Array = (values * np.float32(preprocess.scale) - mean) / std
    return scaled


class Heldout(schema.Strict):
    """Samples that the model has not seen in training; every export is scored on them where they have labels.

    Attributes:
        file: .npz relative to the recipe, with ``x`` (N, ...) raw values and, to be scored, ``y`` (N,) class numbers.
        golden: how many of the samples become golden inputs of a bundle.
    """

    file: str
    golden: int = Field(default=4, ge=1, le=64)


class Keep(schema.Strict):
    """Modules that stay in a higher precision than the one asked for.

    Attributes:
        modules: dotted paths of the deploy form, or globs of them; what is inside a module is meant with it.
        at: ``float``, or ``w8`` for weights in 8 bits with data in floats.
        precisions, targets: where that holds; everywhere if empty.
        why: found by what; a sentence for the user.
    """

    modules: tuple[str, ...] = Field(min_length=1)
    at: Literal["float", "w8"] = "float"
    precisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    why: str = ""


class Quantization(schema.Strict):
    """How the model is quantized, where a precision asks for it.

    Attributes:
        group: weights in 4 bits that share a scale. observer: how ranges of activations are chosen, see
            ``quant.observe.METHODS``.
        equalize: even out the ranges of channels between two layers first. correct: put the mean error of rounded
            weights into the biases.
    """

    group: Literal[32, 64, 128] = 32
    observer: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    equalize: bool = True
    correct: bool = True
    keep: tuple[Keep, ...] = ()

    @field_validator("keep", mode="before")
    @classmethod
    def _tables(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class CalibrationSpec(schema.Strict):
    """What ranges of activations are measured on.

    Attributes:
        source: a folder of images, a .npy or .npz file, or ``package.module:function`` (``file.py:function``) that
            yields samples; relative to the recipe.
        samples: at most so many are used, a subset drawn with ``seed`` where there are more.
    """

    source: str = Field(min_length=1)
    samples: int = Field(default=128, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class Recipe(schema.Strict):
    """A model, its inputs and outputs, and what its exports are scored on.

    Attributes:
        labels: names of the classes, in the order of the first output's columns. author: for the artifact's metadata.
    """

    name: str
    description: str = ""
    model: ModelSpec
    inputs: dict[str, InputSpec] = Field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] = ()
    author: str = ""
    heldout: Heldout | None = None
    calibration: CalibrationSpec | None = None
    quant: Quantization = Field(default_factory=Quantization)

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("may hold letters, digits, '.', '_' and '-' only, for it names files")
        return value

    @field_validator("inputs")
    @classmethod
    def _named(cls, value: dict[str, InputSpec]) -> dict[str, InputSpec]:
        if not all(value):
            raise ValueError("every input needs a name")
        return value

    @model_validator(mode="after")
    def _has_inputs(self) -> Recipe:
        if not self.inputs and not self.model.factory.startswith("timm:"):
            raise ValueError("needs at least one input, such as [inputs.x] with shape = [1, 3, 224, 224]")
        return self

    @field_validator("outputs")
    @classmethod
    def _distinct(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(set(value)) != len(value) or not all(value):
            raise ValueError("every output needs a name of its own")
        if taken := set(value) & set(info.data.get("inputs", ())):
            raise ValueError(f"{', '.join(sorted(taken))} is the name of an input already")
        return value

    def specs(self) -> list[TensorSpec]:
        """The inputs in order."""
        return [TensorSpec(name, s.shape, s.dtype, s.low, s.high, s.ranges) for name, s in self.inputs.items()]


class Resolved(schema.Strict):
    """A recipe with its files found: what a job of the pipeline is made from.

    Attributes:
        folder: where relative factory paths are looked up.
        checkpoint, heldout: the files and the SHA-256 of their bytes.
        unscored: why the recipe's held-out samples are not used, if they are not.
        calibration: where the calibration samples come from, a path made absolute. calibration_sha256: of a file's
            bytes, or of the names, sizes and times of a folder's files; None where a function of a module yields them.
    """

    recipe: Recipe
    folder: str
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    heldout: str | None = None
    heldout_sha256: str | None = None
    unscored: str | None = None
    calibration: str | None = None
    calibration_sha256: str | None = None

    @property
    def random_weights(self) -> bool:
        """True when there is no checkpoint, hence nothing that was trained."""
        return self.checkpoint is None

    @property
    def sha256(self) -> str:
        """Digest of the recipe's content and of its files' bytes; paths do not count."""
        content = self.recipe.model_dump(mode="json")
        content["model"]["checkpoint"] = self.checkpoint_sha256
        if content["heldout"]:
            content["heldout"]["file"] = self.heldout_sha256
        if content["calibration"] and self.calibration_sha256:
            content["calibration"]["source"] = self.calibration_sha256
        return sha256_data(content)

    @property
    def title(self) -> str:
        """The recipe's name; says ``-random`` where the weights are."""
        return self.recipe.name + ("-random" if self.random_weights else "")


def load(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: not readable, not TOML, or not a valid recipe; names file, key, value and the nearest spelling.
    """
    return schema.validate(Recipe, schema.read_toml(path), str(path))


def _file_of(folder: Path, name: str, key: str, where: str) -> tuple[str, str]:
    path = (folder / name).resolve()
    if not path.is_file():
        raise UsageError("a file is missing", value=str(path), where=f"{where}, {key}", fix="correct the path")
    return str(path), sha256_file(path)


def _calibration_of(folder: Path, source: str, where: str) -> tuple[str, str | None]:
    """Where calibration samples are, absolute, and a digest that changes with them."""
    file, colon, function = source.rpartition(":")
    if colon and file.endswith(".py"):
        found, digest = _file_of(folder, file, "calibration.source", where)
        return f"{found}:{function}", digest
    path = (folder / source).resolve()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return str(path), sha256_data(stats)
    if colon and not path.exists():
        return source, None
    return _file_of(folder, source, "calibration.source", where)


def _factories(file: Path) -> list[str]:
    """Top-level functions and classes of a Python file, without running it.

    Raises:
        UsageError: the file cannot be parsed.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UsageError("a model file cannot be read", value=file, why=str(error)) from error
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def _guest(text: str, inputs: Mapping[str, InputSpec], args: Mapping[str, Any]) -> Recipe:
    """A recipe for ``timm:NAME``, ``file.py[:callable]`` or ``package.module:callable``."""
    source, _, attribute = text.partition(":")
    if source.endswith(".py"):
        file = Path(source)
        if not file.is_file():
            raise UsageError("the model's file does not exist", value=source, fix="correct the path")
        names = _factories(file)
        if not attribute:
            attribute = next((name for name in FACTORY_NAMES if name in names), names[0] if len(names) == 1 else "")
        if not attribute:
            raise UsageError(
                "the model's factory is not clear",
                value=source,
                why=f"the file holds {', '.join(names) or 'no function or class'}",
                fix=f"name one: {source}:{names[0] if names else 'factory'}",
            )
        source = str(file.resolve())
    if not inputs and source != "timm":
        raise UsageError(
            "a model from outside needs its inputs",
            value=text,
            why="only recipes and timm models know their own shapes",
            fix=f"edgeattn export {text} --target onnx --input x=1x3x224x224",
        )
    stem = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    name = attribute if source == "timm" else f"{stem}-{attribute}"
    content = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-") or "guest",
        "description": f"{text} (a model from outside)",
        "model": {"factory": f"{source}:{attribute}", "args": dict(args)},
        "inputs": {name: spec.model_dump() for name, spec in inputs.items()},
    }
    return schema.validate(Recipe, content, "the command line")


def resolve(
    text: str,
    *,
    inputs: Sequence[str | TensorSpec] = (),
    checkpoint: Path | None = None,
    args: Mapping[str, Any] | None = None,
    calibration: CalibrationSpec | None = None,
    keep: Sequence[str] = (),
) -> Resolved:
    """Find the recipe that ``text`` names and the files that it needs.

    Args:
        text: a recipe's name, a path to a recipe (.toml), ``package.module:factory``, a path to a .py file (with
            ``:factory`` where it holds several), or ``timm:NAME``.
        inputs: replace the recipe's inputs of the same names; needed for models from outside.
        checkpoint: takes the place of the recipe's checkpoint.
        args: added to the factory's arguments.
        calibration: takes the place of the recipe's; its source is relative to the current folder.
        keep: modules that stay in floats, beside those of the recipe.

    Raises:
        UsageError: nothing of that name (with the closest), an invalid recipe, or a file that is missing.
    """
    specs = [parse_spec(item) if isinstance(item, str) else item for item in inputs]
    twice = sorted({s.name for s in specs if [other.name for other in specs].count(s.name) > 1})
    if twice:
        raise UsageError("an input is given twice", value=", ".join(twice), where="--input", fix="give each once")
    given = {
        s.name: InputSpec(
            shape=s.shape,
            dtype=s.dtype,
            low=s.low,
            high=s.high,
            dynamic={str(axis): tuple(ends) for axis, *ends in s.dynamic},
        )
        for s in specs
    }
    folder, where = Path.cwd(), "the command line"
    if text.endswith(".toml"):
        recipe, folder, where = load(Path(text)), Path(text).resolve().parent, text
    elif ":" in text or text.endswith(".py"):
        recipe = _guest(text, given, args or {})
    else:
        known = schema.find("recipes")
        if text not in known:
            guests = (
                "A model of your own: package.module:factory, file.py:factory, timm:NAME or a recipe's path (.toml)"
            )
            raise unknown("recipe", text, known, fix=guests)
        recipe, folder, where = load(known[text]), known[text].parent, str(known[text])
    strangers = [name for name in given if recipe.inputs and name not in recipe.inputs]
    if strangers:
        raise UsageError(
            "the recipe has no such input",
            value=", ".join(strangers),
            where="--input",
            why=f"{recipe.name} has {', '.join(recipe.inputs)}",
        )
    model = recipe.model.model_copy(update={"args": {**recipe.model.args, **(args or {})}})
    own = recipe.inputs
    recipe = recipe.model_copy(update={"inputs": {**own, **given}, "model": model})
    if keep:
        asked = Keep(modules=tuple(keep), why="asked for on the command line")
        recipe = recipe.model_copy(
            update={"quant": recipe.quant.model_copy(update={"keep": (*recipe.quant.keep, asked)})}
        )
    found: dict[str, str] = {}
    if checkpoint is not None:
        found["checkpoint"], found["checkpoint_sha256"] = _file_of(Path.cwd(), str(checkpoint), "--checkpoint", "here")
    elif recipe.model.checkpoint:
        pair = _file_of(folder, recipe.model.checkpoint, "model.checkpoint", where)
        found["checkpoint"], found["checkpoint_sha256"] = pair
    first = next(iter(given), None)
    if recipe.heldout and first and given[first].shape[1:] != own[first].shape[1:]:
        recipe = recipe.model_copy(update={"heldout": None})
        found["unscored"] = f"the recipe's held-out samples are not of shape {given[first].shape[1:]}"
    if recipe.heldout:
        found["heldout"], found["heldout_sha256"] = _file_of(folder, recipe.heldout.file, "heldout.file", where)
    base, key = folder, where
    if calibration is not None:
        recipe, base, key = recipe.model_copy(update={"calibration": calibration}), Path.cwd(), "--calibration"
    if recipe.calibration:
        source, digest = _calibration_of(base, recipe.calibration.source, key)
        found["calibration"] = source
        if digest:
            found["calibration_sha256"] = digest
    return Resolved(recipe=recipe, folder=str(folder), **found)


def with_samples(resolved: Resolved, samples: int) -> Resolved:
    """The recipe with another number of calibration samples.

    Raises:
        UsageError: it has none, or the number is none.
    """
    if resolved.recipe.calibration is None:
        raise UsageError(
            "the recipe has no calibration samples",
            value=f"--samples {samples}",
            where=resolved.recipe.name,
            fix="--calibration FOLDER, FILE.npz or package.module:function",
        )
    fields = {**resolved.recipe.calibration.model_dump(), "samples": samples}
    spec = schema.validate(CalibrationSpec, fields, "the command line")
    return resolved.model_copy(update={"recipe": resolved.recipe.model_copy(update={"calibration": spec})})
