"""From an ``nn.Module`` to the single entry ``main``, and one forward in PyTorch beside it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from edgeattn.capture.program import Dynamic, Entry, Program
from edgeattn.capture.ranges import export_ranges
from edgeattn.capture.real import without_complex
from edgeattn.core.errors import ConversionFailed, EdgeAttnError, UsageError


class ModulePath:
    """The path of the module whose forward runs now; after an error, of the innermost one that raised it."""

    def __init__(self) -> None:
        self._stack: list[str] = []

    @property
    def current(self) -> str:
        """Dotted path as in ``named_modules``; ``(model)`` outside of any child."""
        return (self._stack[-1] if self._stack else "") or "(model)"

    @contextlib.contextmanager
    def follow(self, model: nn.Module) -> Iterator[ModulePath]:
        """Follow the calls inside ``model``; its hooks are taken off again."""

        # The hooks touch no argument, so nothing of them shows up in an exported graph. The branches of torch.cond are
        # compiled, where a side effect would be an error; there the module around them is named.
        def enter(path: str) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._stack.append(path)

        def leave(*_: Any) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._stack.pop()

        handles: list[Any] = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a forward's result, flattened in order; numbers and None among them are no outputs."""
    return tuple(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))


def own_copies(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Inputs for one forward, which may change them in place."""
    return tuple(value.clone() for value in inputs.values())


def name_outputs(result: Any, wanted: tuple[str, ...], taken: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a forward's result, flattened in order, under the recipe's names.

    Without names a single output is ``output``; mappings give their keys, other containers ``output_0`` and so on.
    A key that is in ``taken``, the names of the inputs, becomes ``output_KEY``.

    Raises:
        UsageError: another number of outputs than names, or no tensor at all.
    """
    leaves = tensors_of(result)
    if not leaves:
        raise UsageError("the model returns no tensor", value=type(result).__name__, fix="return tensors")
    if wanted and len(wanted) != len(leaves):
        raise UsageError(
            "the recipe names another number of outputs than the model returns",
            value=", ".join(wanted),
            where="outputs",
            why=f"the model returns {len(leaves)}",
        )
    if wanted:
        names = list(wanted)
    elif isinstance(result, Mapping) and len(result) == len(leaves) and all(map(str, result)):
        names = [f"output_{key}" if str(key) in taken else str(key) for key in result]
    else:
        names = ["output"] if len(leaves) == 1 else [f"output_{i}" for i in range(len(leaves))]
    return dict(zip(names, leaves, strict=True))


def run_eager(model: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """One forward without gradients, inputs in order, outputs by name.

    Raises:
        UsageError: the forward fails on these inputs; names the module.
    """
    try:
        with torch.no_grad():
            return name_outputs(model(*own_copies(inputs)), outputs, inputs)
    except EdgeAttnError:
        raise
    except Exception as error:
        path = ModulePath()
        with contextlib.suppress(Exception), torch.no_grad(), path.follow(model):
            model(*own_copies(inputs))  # once more, to learn where
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in inputs.items())
        raise UsageError(
            "the model cannot run on these inputs",
            value=shapes,
            where=f"module {path.current}",
            why=_reason(error),
            fix="correct --input (shape, dtype) or the recipe's [inputs]",
        ) from error


def capture(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    exporter: Callable[..., torch.export.ExportedProgram] = torch.export.export,
    dynamic: Dynamic | None = None,
) -> Program:
    """Export ``model`` in eval mode as the single entry ``main``, for the shapes of ``inputs``.

    Args:
        inputs: example tensors by name, in the order of ``forward``; a dimension that may vary has at least 2 in them.
        outputs: names of the flattened outputs.
        dynamic: dimensions that may vary. Those of several inputs may have to be equal, as batches are, if their ranges
            are the same.

    Raises:
        ConversionFailed: the graph cannot be captured; names the module whose code stands in the way, or the input and
            axis that cannot vary over their whole range.
    """
    dynamic = {name: axes for name, axes in (dynamic or {}).items() if axes}
    path = ModulePath()
    # The graph returns the tensors alone, whatever containers, numbers or named tuples the model puts them in.
    flatten = model.register_forward_hook(lambda module, args, result: tensors_of(result))
    try:
        with torch.no_grad(), warnings.catch_warnings(), path.follow(model):
            warnings.simplefilter("ignore")
            graph = export_ranges(model, inputs, dynamic, exporter) if dynamic else exporter(model, own_copies(inputs))
    except EdgeAttnError:
        raise
    except Exception as error:
        raise conversion_failed(error, path) from error
    finally:
        flatten.remove()
    forget_paths(graph)
    graph = without_complex(graph)
    return Program({"main": Entry(graph, tuple(inputs), outputs, dynamic)})


def forget_paths(graph: torch.export.ExportedProgram) -> None:
    """Take the file paths of this machine out of every node."""
    for module in graph.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def conversion_failed(error: Exception, path: ModulePath) -> ConversionFailed:
    """What torch.export raised, for a user: the module whose code stands in the way."""
    return ConversionFailed(
        "the model cannot be captured as a graph",
        where=f"module {path.current}",
        why=_reason(error),
        fix="its forward must not branch on values of tensors; see torch.export's notes on torch.cond",
        details=_user_frames(error),
    )


#: Whose lines are no news to a user: torch's, and ours apart from the models.
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parent, Path(contextlib.__file__))


def _user_frames(error: BaseException) -> list[str]:
    """Lines of model code on the way to ``error``: everything that is not torch's or ours."""
    frames, frame = [], error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith("<") and not any(Path(file).is_relative_to(root) for root in _NOT_THE_USERS):
            frames.append(f"{file}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}")
        frame = frame.tb_next
    return frames[-3:]
