"""What it costs to round to 8 bits what all targets keep in floats: softmax, norms, pools, sums, attention's products.

    python benchmarks/protection.py [--samples 64]

Simulated in PyTorch on the deploy form, one kind of operation at a time, on held-out samples of the trained recipes;
relative L2 of the logits and the change of top-1 accuracy on all of them. Then the parts of a decoder that the recipes
do not have, latent attention with rotary positions and a squared ReLU, on one layer with random weights and normal
inputs of which one channel in 64 is eight times as loud, as in trained ones: such figures rank kinds, they say nothing
of a trained model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.simulate import Operations, Style


class LatentAttention(nn.Module):
    """One layer: keys and values from a normalized latent, a rotary part beside it, then a squared ReLU."""

    def __init__(self, width: int = 256, heads: int = 4, latent: int = 64, nope: int = 32, rope: int = 16) -> None:
        super().__init__()
        self.heads, self.latent, self.nope, self.rope = heads, latent, nope, rope
        self.q = nn.Linear(width, heads * (nope + rope), bias=False)
        self.down = nn.Linear(width, latent + rope, bias=False)
        self.latent_norm = nn.LayerNorm(latent, bias=False)
        self.up = nn.Linear(latent, heads * (nope + nope), bias=False)
        self.proj = nn.Linear(heads * nope, width, bias=False)
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def _rotated(self, x: Tensor) -> Tensor:
        """x (..., T, rope), rotated by position."""
        half = self.rope // 2
        angle = torch.arange(x.shape[-2])[:, None] / 10000.0 ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, -1).transpose(1, 2)
        latent, key_rope = self.down(x).split([self.latent, self.rope], dim=-1)
        both = self.up(self.latent_norm(latent)).reshape(batch, length, self.heads, -1).transpose(1, 2)
        key, value = both.split([self.nope, self.nope], dim=-1)
        scores = q[..., : self.nope] @ key.transpose(-2, -1)
        scores = scores + self._rotated(q[..., self.nope :]) @ self._rotated(key_rope)[:, None].transpose(-2, -1)
        weights = torch.softmax(scores * (self.nope + self.rope) ** -0.5, dim=-1)
        x = x + self.proj((weights @ value).transpose(1, 2).reshape(batch, length, -1))
        return x + self.contract(torch.relu(self.expand(self.norm(x))).square())


def by_kind(model: nn.Module, name: str, x: Any, labels: Any, few: int) -> list[tuple[str, float, float | None]]:
    """Kind, relative L2 and top-1 drop (percentage points) with every operation of the kind rounded."""
    feeds = [{name: row[None]} for row in x[:few]]
    operations = Operations(model, QuantPlan("w8a8"), feeds, Style(zero_point=True))
    data = torch.from_numpy(x)
    with torch.no_grad():
        plain = model(data)
        found = []
        for unit in operations.units:
            if unit.name.startswith("every "):
                with operations.rounded(unit.alone):
                    y = model(data)
                drop = None
                if labels is not None:
                    right = [(v.argmax(1).numpy() == labels).mean() for v in (plain, y)]
                    drop = 100 * float(right[0] - right[1])
                found.append((unit.name.removeprefix("every "), float((y - plain).norm() / plain.norm()), drop))
    return sorted(found, key=lambda row: -row[1])


def trained(recipe_name: str) -> tuple[nn.Module, str, Any, Any]:
    """The deploy form of a recipe, its input's name, held-out samples and labels."""
    from edgeattn import recipe
    from edgeattn.models.build import build
    from edgeattn.pipeline.stages.reference import heldout_samples
    from edgeattn.reparam import reparameterize

    resolved = recipe.resolve(recipe_name)
    built = build(resolved)
    spec = built.specs[0]
    x, y = heldout_samples(resolved, spec.shape)
    return reparameterize(built.model, torch.from_numpy(x[: spec.shape[0]])).model, spec.name, x, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    cases = {name: trained(name) for name in ("fmvit-digits", "fmvit-scenes")}
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    loud = np.where(np.arange(256) % 64 == 0, 8.0, 1.0)
    x = (rng.standard_normal((64, 32, 256)) * loud).astype(np.float32)
    cases["latent attention (random)"] = (LatentAttention().eval(), "x", x, None)
    for name, (model, key, data, labels) in cases.items():
        table = Table("operation, rounded everywhere", "relative L2", "top-1 drop", title=name)
        for kind, error, drop in by_kind(model, key, data, labels, args.samples):
            table.add_row(kind, f"{error:.4f}", "" if drop is None else f"{drop:+.2f} pp")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
