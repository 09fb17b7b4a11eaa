"""From a resolved recipe to an ``nn.Module`` in eval mode: a first citizen, or a guest from outside."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from edgeattn.core.errors import EdgeAttnError, ToolchainMissing, UsageError, closest
from edgeattn.core.specs import TensorSpec
from edgeattn.models.checkpoint import load_folder, load_state, read_config, read_state
from edgeattn.models.init import randomize, settled
from edgeattn.recipe import Resolved


@dataclass(frozen=True)
class Built:
    """A model as the recipe describes it.

    Attributes:
        model: training form, eval mode, float32 as the factory made it.
        specs: its inputs in order.
    """

    model: nn.Module
    specs: list[TensorSpec]

    def random_inputs(self, seed: int, end: Literal["min", "opt", "max"] = "opt") -> dict[str, torch.Tensor]:
        """Seeded random inputs by name, dimensions that may vary at that ``end`` of their range."""
        return {spec.name: torch.from_numpy(spec.at(end).random(seed + i)) for i, spec in enumerate(self.specs)}


#: A torch.library.Library takes its definitions back when it is collected.
_KEPT: list[Any] = []


def _mend_torchvision() -> None:
    """Let torchvision, which timm and many guests import, be imported beside a CPU build of torch too.

    On PyPI it is built for CUDA only: its compiled operators do not load then, and its import stops at
    ``torchvision::nms``. Declaring the two schemas that it asks for is enough, as long as nothing calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    compiled = Path(spec.origin).with_name("_C.so") if spec and spec.origin else None
    if _KEPT or "torchvision" in sys.modules or compiled is None or not compiled.is_file():
        return
    try:
        torch.ops.load_library(compiled)  # type: ignore[no-untyped-call]
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _KEPT.append(library)


def import_timm() -> ModuleType:
    """timm.

    Raises:
        ToolchainMissing: it is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ToolchainMissing(
            "timm is not installed", why="timm: models are built by it", fix="pip install 'edgeattn[timm]'"
        )
    _mend_torchvision()
    return importlib.import_module("timm")


@contextlib.contextmanager
def own_folder(text: str, folder: str) -> Iterator[None]:
    """Let a guest's code import its neighbours first; afterwards they come last, so that they shadow no library.

    Args:
        text: as in ``find_callable``; nothing is done for a first citizen. folder: where relative paths begin.
    """
    source = text.partition(":")[0]
    if source.partition(".")[0] in ("edgeattn", "timm"):
        yield
        return
    place = str(Path(folder, source).parent if source.endswith(".py") else Path(folder))
    sys.path.insert(0, place)
    try:
        yield
    finally:
        if place in sys.path:  # a guest may have tidied up itself
            sys.path.remove(place)
        sys.path.append(place)


def _module(source: str) -> ModuleType:
    """Import ``source``: a path to a .py file or a dotted name."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source)
    spec = importlib.util.spec_from_file_location(f"edgeattn_guest_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError("a model file cannot be imported", value=source)
    module = importlib.util.module_from_spec(spec)
    # Registered, so that dataclasses and torch.export find the module by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _theirs(file: str) -> bool:
    """Whether a line of ``file`` tells a user more than the one that called it: not ours, torch's or Python's own."""
    path = Path(file)
    ours = (Path(__file__).resolve().parents[1], Path(torch.__file__).parent)
    library = Path(importlib.__file__).parents[1]
    python = path.is_relative_to(library) and "site-packages" not in path.relative_to(library).parts
    return not file.startswith("<") and not python and not any(path.is_relative_to(folder) for folder in ours)


def guest_error(what: str, factory: str, error: BaseException) -> UsageError:
    """The user's own code failed: say where in it."""
    frame = error.__traceback__
    place = None
    if isinstance(error, SyntaxError) and error.filename:
        place, frame = f"{error.filename}:{error.lineno}", None
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if _theirs(file):
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return UsageError(what, value=factory, where=place, why=f"{type(error).__name__}: {error}")


def find_callable(text: str, folder: str, kind: str) -> Any:
    """What ``package.module:name`` or ``file.py:name`` (relative to ``folder``) names.

    Args:
        kind: what it is to the user, as in "factory".

    Raises:
        UsageError: the module cannot be imported, or holds nothing of that name (with the closest).
    """
    source, _, attribute = text.partition(":")
    if source.endswith(".py"):
        source = str(Path(folder, source))
    _mend_torchvision()
    try:
        module = _module(source)
        target = getattr(module, attribute, None)
    except EdgeAttnError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(
            "a module cannot be found",
            value=error.name,
            where=text,
            why="it is neither installed nor in this folder",
            fix=f"install it, run from the folder that holds it, or give a path: path/to/file.py:{kind}",
        ) from error
    except (Exception, SystemExit) as error:
        raise guest_error(f"the module of the {kind} cannot be imported", text, error) from error
    if target is None:
        near = closest(attribute, vars(module))
        raise UsageError(
            f"the module has no such {kind}",
            value=attribute,
            where=source,
            fix=f"did you mean {near!r}?" if near else None,
        )
    return target


def _call(resolved: Resolved) -> tuple[nn.Module, list[TensorSpec]]:
    recipe = resolved.recipe
    source, _, attribute = recipe.model.factory.partition(":")
    specs = recipe.specs()
    if source == "timm":
        timm = import_timm()
        if attribute not in timm.list_models():
            near = closest(attribute, timm.list_models())
            raise UsageError(
                "timm has no such model",
                value=attribute,
                fix=f"did you mean {near!r}?" if near else "timm.list_models()",
            )
        try:
            model = timm.create_model(attribute, pretrained=False, **recipe.model.args)
        except Exception as error:
            raise guest_error("timm cannot build the model", recipe.model.factory, error) from error
        return model, specs or [TensorSpec("x", (1, *model.default_cfg["input_size"]))]
    target = find_callable(recipe.model.factory, resolved.folder, "factory")
    if isinstance(target, nn.Module):
        return target, specs
    folder = Path(resolved.checkpoint) if resolved.checkpoint else None
    content = read_config(folder) if folder and folder.is_dir() else None
    try:
        if content is not None and hasattr(target, "from_config"):
            model = target.from_config({**content, **recipe.model.args}, str(folder))
        else:
            model = target(**recipe.model.args)
    except EdgeAttnError:
        raise
    except (Exception, SystemExit) as error:
        raise guest_error("the model's factory failed", recipe.model.factory, error) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            "the factory did not return a torch.nn.Module",
            value=type(model).__name__,
            where=recipe.model.factory,
            fix="return the model itself",
        )
    return model, specs


def build(resolved: Resolved) -> Built:
    """Call the recipe's factory under its seed and load the checkpoint, if there is one.

    A factory with an attribute ``from_config(content, where)`` is asked for the model of a checkpoint folder's
    ``config.json``. Without a checkpoint the weights are the factory's random ones; batch norms get settled statistics
    and a random affine part (``models.init.randomize``), so that fusing them is a real test, unless the factory gave
    them some.

    Raises:
        UsageError: the factory cannot be found, fails or returns something else; the checkpoint cannot be read or
            does not fit. ToolchainMissing: timm is needed and not installed.
    """
    torch.manual_seed(resolved.recipe.seed)
    with own_folder(resolved.recipe.model.factory, resolved.folder):
        model, specs = _call(resolved)
    model.eval()  # a statement of its own: a guest's may return nothing
    built = Built(model, specs)
    if resolved.checkpoint is not None and Path(resolved.checkpoint).is_dir():
        load_folder(model, Path(resolved.checkpoint))
    elif resolved.checkpoint is not None:
        load_state(model, read_state(Path(resolved.checkpoint)), resolved.checkpoint)
    elif not settled(model):
        randomize(model, tuple(built.random_inputs(resolved.recipe.seed).values()), resolved.recipe.seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return built
