"""Weights read without executing them, and loaded with every mismatch listed."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeattn.core.errors import UsageError, closest

#: Keys under which training scripts nest a state dict, in the order in which they are tried.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "params", "weights")


def _plain(state: Mapping[Any, Any]) -> bool:
    return bool(state) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _globals(path: Path) -> set[str]:
    """Python objects that the pickles of a file name, learned from their opcodes without running them."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    except (zipfile.BadZipFile, StopIteration, KeyError, OSError):
        data = path.read_bytes()
    stream, found, texts = io.BytesIO(data), set(), ["", ""]
    with contextlib.suppress(Exception):  # what comes after the last pickle, or after a cut, is none
        while stream.tell() < len(data):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    return found


def _code(path: Path, refusal: str) -> list[str]:
    """What of ``_globals`` made PyTorch refuse the file with ``refusal``."""
    usual = ("torch.", "collections.")
    return sorted(name for name in _globals(path) if not name.startswith(usual) or f"GLOBAL {name} " in refusal)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``module.`` that data-parallel training puts before all of them."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        "the checkpoint is damaged",
        value=path,
        why=f"not a whole safetensors file: {error}",
        fix="copy it again, or compare its SHA-256 with the sender's",
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, or of a .pth / .pt / .bin file read with ``weights_only=True``.

    A state dict nested under one of ``NESTS`` is found, and the ``module.`` prefix of data-parallel training is
    taken off.

    Raises:
        UsageError: truncated, not a checkpoint, or a pickle that holds code (which is not run).
    """
    if path.suffix == ".safetensors":
        try:
            return _bare(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError("the checkpoint cannot be read", value=path, why=error.strerror or str(error)) from error
    except Exception as error:  # a damaged pickle makes the reader raise nearly anything
        wanted = _code(path, str(error)) if isinstance(error, pickle.UnpicklingError) else []
        if wanted:
            raise UsageError(
                "the checkpoint holds code, which is not executed",
                value=path,
                why=f"it asks for {', '.join(wanted)}",
                fix="save only the weights: torch.save(model.state_dict(), ...), or better a .safetensors file",
            ) from None
        raise UsageError(
            "the checkpoint is damaged",
            value=path,
            why=f"not a whole PyTorch file: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="copy it again, or save it as .safetensors",
        ) from error
    state: Any = loaded
    while isinstance(state, Mapping) and not _plain(state):
        key = next((k for k in NESTS if isinstance(state.get(k), Mapping)), None)
        if key is None:
            break
        state = state[key]
    if not isinstance(state, Mapping) or not _plain(state):
        holds = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
        raise UsageError(
            "the checkpoint holds no state dict",
            value=path,
            why=f"found {holds}",
            fix=f"a mapping of names to tensors, or one under {', '.join(NESTS)}",
        )
    return _bare(state)


def _kind(value: Tensor) -> str:
    layout = "" if value.layout == torch.strided else f", {str(value.layout).removeprefix('torch.')}"
    return str(value.dtype).removeprefix("torch.") + layout + (", without data" if value.is_meta else "")


def _same_kind(own: Tensor, given: Tensor) -> bool:
    """Whether ``given`` can be copied into ``own`` with no more than a float's rounding."""
    dense = given.layout == torch.strided and not given.is_meta
    return dense and (given.dtype == own.dtype or (given.is_floating_point() and own.is_floating_point()))


def _mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """Every missing, extra and mis-shaped tensor and those of another kind, a line each; and how many in words."""
    # Step counters of batch norm do not reach the numbers; files written before PyTorch 0.4.1 lack them.
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in own]
    shapes = [k for k in own if k in given and own[k].shape != given[k].shape]
    kinds = [k for k in own if k in given and not _same_kind(own[k], given[k])]
    lines = [f"missing: {k} {tuple(own[k].shape)}" for k in missing]
    for key in extra:
        near = closest(key, missing)
        lines.append(f"extra: {key} {tuple(given[key].shape)}" + (f" (is it {near}?)" if near else ""))
    lines += [f"shape: {k} is {tuple(given[k].shape)}, the model has {tuple(own[k].shape)}" for k in shapes]
    lines += [f"dtype: {k} is {_kind(given[k])}, the model has {_kind(own[k])}" for k in kinds]
    return lines, (
        f"{len(missing)} missing, {len(extra)} extra, {len(shapes)} of another shape, {len(kinds)} of another kind"
    )


def _refuse(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    lines, counts = _mismatches(own, given)
    if lines:
        raise UsageError(
            "the checkpoint does not fit the model",
            where=source,
            why=counts,
            fix="use the factory and arguments that the checkpoint was trained with",
            details=lines,
        )


def _converter(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """What becomes of a checkpoint's tensor: ``from_released(name, tensor)`` of models that store some otherwise."""
    found: Callable[[str, Tensor], Tensor] = getattr(model, "from_released", lambda name, value: value)
    return found


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put ``state`` into ``model``; names and shapes must match exactly.

    Raises:
        UsageError: lists every missing, extra and mis-shaped tensor (with the nearest name), and those of another
            kind, such as integers for floats; the model is untouched.
    """
    _refuse(model.state_dict(), state, source)
    convert = _converter(model)
    model.load_state_dict({name: convert(name, value) for name, value in state.items()}, strict=False)


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder in Hugging Face's layout.

    Raises:
        UsageError: the index is damaged, or names a file that is not there or lies elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError("the checkpoint's index is damaged", value=index, why=why, fix="copy it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UsageError("a file of the checkpoint is missing", value=name, where=str(index), fix="copy it again")
    return [folder / name for name in names]


def read_config(folder: Path) -> dict[str, Any] | None:
    """The ``config.json`` of a checkpoint; None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("the checkpoint's configuration is damaged", value=path, why=str(error)) from error
    if not isinstance(content, dict):
        raise UsageError("the checkpoint's configuration is damaged", value=path, why="it is no JSON object")
    return content


def load_folder(model: nn.Module, folder: Path) -> None:
    """Put the weights of a folder in Hugging Face's layout into ``model``, one tensor after the other.

    Files are memory-mapped; a tensor that has the model's dtype and needs no change is used as it lies there, so that
    there is never more than one copy in memory. Weights of ``model`` may be on the meta device.

    Raises:
        UsageError: damaged, or lists every missing, extra and mis-shaped tensor; the model is untouched then.
    """
    own, files, given = dict(model.state_dict()), {}, dict[str, Tensor]()
    convert = _converter(model)
    with contextlib.ExitStack() as stack:
        for path in _shards(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    files[name], given[name] = file, file.get_tensor(name)
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(path, error) from error
        _refuse(own, given, str(folder))
        del given
        for name, file in files.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            value = convert(name, file.get_tensor(name).to(own[name].dtype))
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[attribute] = value
