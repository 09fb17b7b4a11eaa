"""Where two programs part: the first torch module whose output an artifact no longer gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import targets
from edgeattn.core.numerics import Array, compare
from edgeattn.targets.base import own_feeds

if TYPE_CHECKING:
    from edgeattn.pipeline.context import Context
    from edgeattn.targets.base import Runtime, Tensor


def module_outputs(model: object, feeds: dict[str, Array]) -> dict[str, Array]:
    """Single-tensor outputs of every module in the order in which they are finished, by path."""
    import torch

    assert isinstance(model, torch.nn.Module)
    outputs: dict[str, Array] = {}

    def keep(path: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[path] = value.detach().clone().numpy()

    handles = [
        m.register_forward_hook(lambda _m, _i, value, path=path: keep(path, value)) for path, m in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(*(torch.from_numpy(value.copy()) for value in feeds.values()))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _as_in_torch(value: Array, shape: tuple[int, ...]) -> Array | None:
    """A traced tensor in the module's own shape: as it is, or from (B, H, W, C) to (B, C, H, W); None if neither."""
    if value.ndim == 4 and len(shape) == 4 and value.shape != shape:
        value = value.transpose(0, 3, 1, 2)
    return value if value.shape == shape else None


def first_divergence(context: Context, runtime: Runtime, inputs: Sequence[Tensor], feeds: dict[str, Array]) -> str:
    """Names the first module of the deploy form whose output the artifact misses by more than the tolerance.

    A module's output inside the artifact is the last tensor that the exporter attributes to it or to a child of it;
    modules whose tensors were fused away or have another shape are passed over.

    Args:
        inputs: of the artifact's entry. feeds: of the model.
    """
    torch_values = module_outputs(context.value("reparameterize"), feeds)
    trace = list(runtime.trace("main", own_feeds(inputs, feeds)))
    tolerance = targets.get(context.job.target).tolerance(context.job.precision)
    for path, reference in torch_values.items():
        inside = [t for t in trace if path and (t.module == path or t.module.startswith(f"{path}."))]
        if not inside:
            continue
        found = inside[-1]
        value = _as_in_torch(found.value, reference.shape)
        if value is None:
            continue
        measured = compare(reference, value.astype(np.float32))
        if not measured.holds(tolerance):
            return (
                f"module {path} is the first to diverge (its {found.op}, tensor {found.name}): "
                f"relative L2 {measured.relative_l2:.3g}, largest reference value {float(np.abs(reference).max()):.3g}"
            )
    return "no single module: the error builds up over the whole graph"


def own_rounding(context: Context, feeds: dict[str, Array], reference: dict[str, Array]) -> list[str]:
    """How far the reference itself, in float32, is from the deploy form in float64, by output, in words.

    An artifact cannot be held to less than its model's own rounding; random weights can amplify it without bound.
    """
    import copy

    import torch

    from edgeattn.capture import run_eager

    wide = {k: torch.from_numpy(v.copy()) for k, v in feeds.items()}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in wide.items()}
    try:
        exact = run_eager(copy.deepcopy(context.value("reparameterize")).double(), wide, tuple(reference))
    except Exception:  # not every model can be copied, or runs in float64 with float32 tensors of its own making
        return []
    far = {
        k: compare(exact[k].numpy().astype(np.float64), v.astype(np.float64)).relative_l2 for k, v in reference.items()
    }
    return [
        f"for comparison: the float32 reference's own rounding of {k} is {n:.2g} (from float64)" for k, n in far.items()
    ]
