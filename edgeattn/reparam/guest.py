"""Rule ``guest``: a model's own way to its deploy form (timm, RepVGG, MobileOne, LeViT and their like), with proof."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from edgeattn.reparam.block import Block, Refused, Rule, Site
from edgeattn.reparam.proof import NotFused

NAME = "guest"
METHODS = ("reparameterize", "switch_to_deploy", "fuse")


class Unchanged(Refused):
    """The method ran and changed nothing: there was nothing to fuse."""


def method_of(module: nn.Module) -> str | None:
    """The name of the module's own reparameterization method, or None."""
    for name in METHODS:
        found = getattr(module, name, None)
        if callable(found) and not isinstance(found, nn.Module):  # a child may have such a name: a layer that fuses
            return name
    return None


def _form(module: nn.Module) -> Any:
    """What tells two forms of a module apart."""
    kinds = [(path, type(child)) for path, child in module.named_modules()]
    return kinds, [(path, tuple(p.shape)) for path, p in module.named_parameters()]


def _fuse(method: str) -> Callable[[nn.Module], nn.Module]:
    def fuse(module: nn.Module) -> nn.Module:
        form = _form(module)
        try:
            result = getattr(module, method)()
        except (Exception, SystemExit) as error:  # any guest may raise anything; the report names it
            raise Refused(f"{method}() raised {type(error).__name__}: {error}") from error
        fused = result if isinstance(result, nn.Module) else module
        if _form(fused) == form:
            raise Unchanged(f"{method}() changed nothing")
        return fused

    return fuse


def _needs_arguments(module: nn.Module, method: str) -> bool:
    try:
        parameters = inspect.signature(getattr(module, method)).parameters.values()
    except (TypeError, ValueError):
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in optional for p in parameters)


def propose(site: Site) -> Iterator[Block | NotFused]:
    """The outermost modules with a method ``reparameterize``, ``switch_to_deploy`` or ``fuse`` without arguments.

    Given:
        a module in its training form
    Result:
        the module its method returns, or the module itself if the method changes it in place.

    Outermost first, since an outer method knows how to use those inside (RepViT's block, FastViT's RepMixer); inside a
    block whose method raised or did not hold, each inner module is tried on its own. The model's own method is left for
    last: it only calls those inside.
    """

    def visit(module: nn.Module) -> Iterator[Block | NotFused]:
        method = method_of(module)
        path = site.paths[module]
        driver = module is site.model and any(method_of(m) for m in module.modules() if m is not module)
        if method and not driver and (NAME, path) not in site.rejected:
            if not _needs_arguments(module, method):
                yield Block(
                    path=path,
                    rule=NAME,
                    modules=(path,),
                    entry=module,
                    before=module,
                    fuse=_fuse(method),
                    pairs=lambda fused: [(module, fused)],
                    crop=lambda x: 1 if x.ndim == 4 else None,
                )
                return
            yield NotFused(path, NAME, f"{method}() needs arguments")
        for child in module.children():
            if child not in seen:
                seen.add(child)
                yield from visit(child)

    seen = {site.model}
    yield from visit(site.model)


RULE = Rule(NAME, propose)
