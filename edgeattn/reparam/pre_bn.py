"""Rule ``pre_bn``: a batch norm goes into all the 1x1 convolutions and linear layers behind it, or into none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from edgeattn.reparam.block import Block, Refused, Rule, Site
from edgeattn.reparam.flow import Fan, Step, consumers, describe, enclosing, passes, without_affine
from edgeattn.reparam.fold import (
    Layer,
    batch_norm_affine,
    channel_axis,
    fold_input_affine,
    is_batch_norm,
    is_layer,
    is_plain,
)
from edgeattn.reparam.proof import NotFused
from edgeattn.reparam.trace import Call, Value

NAME = "pre_bn"


def _check_batch_norm(site: Site, bn: _BatchNorm) -> Call:
    site.once(bn)
    if bn.running_mean is None:
        raise Refused("it has no running statistics, so it normalises by the batch")
    call = site.record.calls_of(bn)[0]
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        raise Refused("it was not called with one tensor")
    if not is_plain(bn) and list(without_affine(site.record, call)):
        raise Refused(f"{type(bn).__name__} has an activation between its batch norm and the next layer")
    last = max(op.index for op in site.record.readers(call.inputs[0]) if op.call is not None and op.call.within(call))
    late = [op for op in site.record.writers(call.inputs[0]) if op.index > last]
    if late:  # without the batch norm its readers would see the change
        raise Refused(f"its input is changed in place later, by {describe(late[0])}")
    return call


def _check_layer(site: Site, layer: Layer, axis: int, ndim: int) -> None:
    path = site.paths[layer]
    site.once(layer)
    if isinstance(layer, _ConvTransposeNd):
        raise Refused(f"{path} is a transposed convolution")
    if not isinstance(layer, nn.Linear):
        padding = layer.padding
        padded = any(padding) if not isinstance(padding, str) else padding == "same" and max(layer.kernel_size) > 1
        if padded:
            raise Refused(f"{path} pads its input with zeros, where the batch norm's shift would be missing")
    if axis != channel_axis(layer, ndim):
        raise Refused(f"{path} mixes along another axis than the batch norm's channels")


def _chains(site: Site, value: Value, axis: int) -> Iterator[tuple[Step, ...]]:
    """All ways from ``value`` to a layer: batch norms and passing operations in a row, the layer at the end."""
    seen: set[int] = set()
    for op in consumers(site.record, value):
        call = enclosing(op, lambda module: is_layer(module) or is_batch_norm(module))
        if call is None:
            if op.args[:1] and op.outputs:
                moved = passes(op, axis)
                for chain in _chains(site, op.outputs[0], moved):
                    yield (Step(op=op), *chain)
                continue
            raise Refused(f"its output is read by {describe(op)}")
        if id(call) in seen:
            continue
        seen.add(id(call))
        if call.inputs != (value,):
            raise Refused(f"its output is read inside {call.path}, but not as its one input")
        module = call.module
        if is_layer(module):
            _check_layer(site, module, axis, len(value.shape))
            yield (Step(call=call),)
        else:
            assert is_batch_norm(module)
            _check_batch_norm(site, module)
            if axis != 1:
                raise Refused(f"{call.path} normalises another axis")
            for chain in _chains(site, call.outputs[0], axis):
                yield (Step(call=call), *chain)


def _fuse(fan: nn.Module) -> nn.Module:
    assert isinstance(fan, Fan)
    assert is_batch_norm(fan.head)
    folded: list[list[nn.Module]] = []
    for chain in fan.links():
        scale, shift = batch_norm_affine(fan.head)
        *steps, layer = chain
        for step in steps:
            if is_batch_norm(step):
                s, t = batch_norm_affine(step)
                scale, shift = s * scale, s * shift + t
        assert is_layer(layer)
        fold_input_affine(layer, scale, shift)
        folded.append([nn.Identity() if is_batch_norm(step) else step for step in steps] + [layer])
    return Fan(nn.Identity(), folded)


def _block(site: Site, bn: _BatchNorm) -> Block:
    call = _check_batch_norm(site, bn)
    chains = list(_chains(site, call.outputs[0], 1))
    if not chains:
        raise Refused("nothing reads its output")
    before = Fan(bn, [[step.module() for step in chain] for chain in chains])
    whole = any(step.shaped for chain in chains for step in chain)
    passed = [step.call for chain in chains for step in chain if step.call is not None]
    norms = [bn, *dict.fromkeys(c.module for c in passed if is_batch_norm(c.module))]
    layers = [chain[-1].module() for chain in chains]

    def pairs(fused: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        assert isinstance(fused, Fan)
        new = [chain[-1] for chain in fused.links()]
        return [*((norm, nn.Identity()) for norm in norms), *zip(layers, new, strict=True)]

    def axis(x: Tensor) -> int | None:
        return None if whole else 1

    paths = tuple(site.paths[module] for module in [*norms, *layers])
    return Block(paths[0], NAME, paths, bn, before, _fuse, pairs, axis)


def propose(site: Site) -> Iterator[Block | NotFused]:
    """Every BatchNorm whose readers are all layers without padding, directly or through affine-transparent operations.

    Given:
        y_i = W_i P_i(BN(x)) + b_i, for all readers i of the batch norm; P_i average pools that do not count padding,
        means over other axes, views, and further batch norms
    Result:
        y_i = W_i' P_i(x) + b_i', W' = W diag(s), b' = b + W t; through a second batch norm s = s1 s2, t = s2 t1 + t2.
        Every batch norm on the way is replaced by nn.Identity.

    Exact only where no zeros are padded behind the batch norm: a padded convolution makes it ``NotFused``.
    """
    if not any(is_batch_norm(module) for module in site.paths):
        return
    claimed: set[str] = set()
    # In order of execution: the first batch norm of a chain takes the later ones with it.
    order = dict.fromkeys(call.module for call in site.record.calls if is_batch_norm(call.module))
    unreached = [module for module in site.paths if is_batch_norm(module) and module not in order]
    for module in [*order, *unreached]:
        path = site.paths[module]
        if path in claimed:
            continue
        try:
            assert is_batch_norm(module)
            block = _block(site, module)
        except Refused as refusal:
            yield NotFused(path, NAME, str(refusal))
        else:
            if (NAME, path) not in site.rejected:
                claimed.update(block.modules)
            yield block


RULE = Rule(NAME, propose)
