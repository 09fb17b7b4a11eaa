"""From a name on the command line to a recipe and the files that it needs."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeattn.core import schema
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.hashing import sha256_data, sha256_file
from edgeattn.core.specs import TensorSpec, parse_spec
from edgeattn.recipe.schema import CalibrationSpec, InputSpec, Keep, Recipe, Resolved

#: Names under which a .py file's factory is looked for when none is given.
FACTORY_NAMES = ("factory", "build", "build_model", "create_model", "get_model", "make_model", "model", "Model")

#: Of a checkpoint in Hugging Face's layout, what a model is built and a tokenizer made from.
WEIGHTS, CONFIG = ("model.safetensors", "model.safetensors.index.json"), "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


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


def _digest_of(folder: Path, names: Sequence[str]) -> str:
    """Of the bytes of these files, as far as they are there."""
    return sha256_data({name: sha256_file(folder / name) for name in names if (folder / name).is_file()})


def _checkpoint_of(folder: Path, name: str, key: str, where: str) -> tuple[str, str]:
    """A checkpoint, a file or a folder in Hugging Face's layout, and a digest of its bytes."""
    path = (folder / name).resolve()
    if not path.is_dir():
        return _file_of(folder, name, key, where)
    if not any((path / weights).is_file() for weights in WEIGHTS):
        raise UsageError(
            "the folder holds no checkpoint",
            value=str(path),
            where=f"{where}, {key}",
            why=f"it has no {' or '.join(WEIGHTS)}",
            fix="give the folder of a Hugging Face model, or a .safetensors file",
        )
    shards = [file.name for file in path.glob("*.safetensors")]
    return str(path), _digest_of(path, sorted({*shards, *WEIGHTS, CONFIG}))


def _tokenizer_of(recipe: Recipe, folder: Path, checkpoint: str | None, where: str) -> dict[str, str]:
    """The checkpoint's own tokenizer, else the one that the recipe names."""
    named = recipe.decoder.tokenizer if recipe.decoder else None
    own = Path(checkpoint) if checkpoint else None
    if own is not None and (own / TOKENIZER[0]).is_file():
        place = own
    elif named:
        place = (folder / named).resolve()
        if not (place / TOKENIZER[0]).is_file():
            raise UsageError(
                "the tokenizer is missing", value=str(place / TOKENIZER[0]), where=f"{where}, decoder.tokenizer"
            )
    else:
        return {}
    return {"tokenizer": str(place), "tokenizer_sha256": _digest_of(place, TOKENIZER)}


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
        pair = _checkpoint_of(Path.cwd(), str(checkpoint), "--checkpoint", "here")
        found["checkpoint"], found["checkpoint_sha256"] = pair
    elif recipe.model.checkpoint:
        pair = _checkpoint_of(folder, recipe.model.checkpoint, "model.checkpoint", where)
        found["checkpoint"], found["checkpoint_sha256"] = pair
    first = next(iter(given), None)
    if recipe.heldout and first and given[first].shape[1:] != own[first].shape[1:]:
        recipe = recipe.model_copy(update={"heldout": None})
        found["unscored"] = f"the recipe's held-out samples are not of shape {given[first].shape[1:]}"
    if recipe.heldout:
        found["heldout"], found["heldout_sha256"] = _file_of(folder, recipe.heldout.file, "heldout.file", where)
    if recipe.decoder:
        found |= _tokenizer_of(recipe, folder, found.get("checkpoint"), where)
        if recipe.decoder.text:
            found["text"], found["text_sha256"] = _file_of(folder, recipe.decoder.text, "decoder.text", where)
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
