"""What rounding its weights alone does to a decoder of random weights, which amplify it: found in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgeattn.core.numerics import compare
from edgeattn.models.decoder import Decoder
from edgeattn.models.layers.mla import AbsorbedAttention
from edgeattn.pipeline.decoding.samples import Text
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import rounded


def _round(weight: Tensor, bits: int, group: int) -> Tensor:
    flat = weight.reshape(-1, weight.shape[-1])
    return torch.from_numpy(rounded(flat.numpy(), bits, group)).reshape(weight.shape)


@contextmanager
def _rounding(model: nn.Module, plan: QuantPlan) -> Iterator[None]:
    """While this lasts every module computes with rounded weights, which exist for the time of its call alone."""
    handles, own = [], dict[Tensor, Tensor]()

    def enter(module: nn.Module, bits: int, group: int) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                own[parameter] = parameter.data
                parameter.data = _round(parameter.data, bits, group)

    def leave(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in own:
                parameter.data = own.pop(parameter)

    for path, module in model.named_modules():
        scheme = plan.scheme(path)
        if isinstance(module, (nn.Linear, AbsorbedAttention)) and not scheme.floats:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, _, s=scheme: enter(m, s.weights, s.group or plan.group)  # type: ignore[misc]
                )
            )
            handles.append(module.register_forward_hook(lambda m, *_: leave(m)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounding_alone(model: nn.Module, plan: QuantPlan, text: Text) -> float:
    """Largest relative L2 of logits and rows with all matrices but the embedding rounded as the plan says."""
    assert isinstance(model, Decoder)
    count = len(next(iter(text.rows.values())))
    at = text.at[text.at < count]
    with torch.no_grad(), _rounding(model, plan):
        logits, rows = model.rows(torch.from_numpy(text.ids[None, :count].copy()), torch.from_numpy(at))
    found = [compare(text.logits[: len(at)], logits.numpy()).relative_l2]
    found += [compare(text.rows[name], row.numpy()).relative_l2 for name, row in zip(text.rows, rows, strict=True)]
    return max(found)
