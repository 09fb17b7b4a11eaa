"""What a convolution shared by all tokens should be on a processor: as it is, one matrix, or a matrix over windows.

    python benchmarks/shared_conv.py [--layers-only] [--rounds 11] [--threads 1] [--seconds 0.05]

Three forms of the same layer, each exported to ONNX as the onnx target does and run in ONNX Runtime on the CPU in
interleaved turns, batch 1, random weights:

    conv      as trained              matrix    models.layers.shared_conv.SharedLinear
    windows   each window gathered, then one matrix product over all of them (valid padding alone)

The last column is what the rule ``shared_conv`` does with it; "slower" marks a choice that costs more than 10 % against
the better of conv and matrix. Then whole models, with the rule and without it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fusion_gain import session, timed
from benchmarks.measure import ratio
from edgeattn import recipe, targets
from edgeattn.capture import capture
from edgeattn.models.build import build
from edgeattn.models.cost import count
from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d, SharedLinear
from edgeattn.reparam import reparameterize
from edgeattn.reparam.engine import RULES
from edgeattn.targets.base import LowerPlan

#: Kind (v valid, s same, t transposed), maps in, kernels or maps out, N, M of the input, tokens.
#: First the layers of the recipes, then a sweep.
LAYERS = [
    *[("v", 1, 192, 8, 8, 64), ("v", 1, 128, 8, 8, 64), ("v", 2, 64, 8, 8, 64)],
    *[("v", 1, 24, 9, 16, 64), ("v", 1, 4, 9, 16, 64), ("t", 8, 1, 9, 8, 64), ("t", 4, 1, 9, 8, 64)],
    *[("v", 1, 12, 5, 8, 64), ("v", 1, 4, 5, 8, 64), ("t", 4, 1, 5, 4, 64), ("t", 1, 1, 5, 4, 64)],
    *[("t", 3, 1, 13, 4, 64), ("v", 64, 1, 7, 16, 1), ("v", 64, 1, 5, 8, 1)],
    *[("s", 1, 24, 3, 16, 64), ("s", 1, 4, 3, 16, 64), ("s", 8, 1, 3, 16, 64)],
    *[("s", 1, 12, 3, 8, 64), ("s", 1, 4, 3, 8, 64), ("s", 4, 1, 3, 8, 64)],
    *[("v", 1, k, n, 8, 64) for n in (7, 5, 3) for k in (1, 8, 16, 64)],
    *[("v", 1, k, n, 16, 64) for n in (15, 13, 9, 5) for k in (1, 8, 16, 64)],
    *[("v", 4, 4, n, 16, 64) for n in (13, 9, 5)],
    *[("v", 1, 12, 5, 8, tokens) for tokens in (4, 16, 256)],
]

MODELS = ["convsharevit-v1", "convsharevit-v2", "convsharevit-v3"]
MODELS += ["convsharevit-v1-digits", "convsharevit-v2-digits", "convsharevit-v3-digits"]


class Windows(nn.Module):
    """A valid shared convolution as a matrix product over gathered windows."""

    index: Tensor

    def __init__(self, of: SharedConv2d, side: int) -> None:
        super().__init__()
        n, self.d, self.kernels = of.size, side - of.size + 1, of.kernels
        places = torch.arange(of.in_maps * side * side).view(of.in_maps, side, side)
        windows = places.unfold(1, n, 1).unfold(2, n, 1).permute(1, 2, 0, 3, 4)
        self.register_buffer("index", windows.flatten())
        self.weight = nn.Parameter(of.weight.detach().flatten(1))
        self.bias = of.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, F, M, M) -> (B, T, K, d, d)."""
        seen = x.flatten(2)[:, :, self.index].reshape(*x.shape[:2], self.d * self.d, -1)
        return F.linear(seen, self.weight, self.bias).transpose(2, 3).reshape(*x.shape[:2], -1, self.d, self.d)


def opened(model: nn.Module, inputs: dict[str, Tensor], threads: int) -> Any:
    """A session of ONNX Runtime on the fp32 export of ``model``."""
    with tempfile.TemporaryDirectory() as folder:
        program = capture(model.eval(), inputs, ("y",))
        targets.get("onnx").lower(program, LowerPlan("fp32", [], {}), Path(folder))
        return session(Path(folder) / "model.onnx", threads)


def turns(sessions: list[Any], inputs: dict[str, Tensor], rounds: int, seconds: float) -> list[list[float]]:
    """Milliseconds of every session in every round, in alternating order."""
    feeds = {key: value.numpy() for key, value in inputs.items()}
    taken: list[list[float]] = [[] for _ in sessions]
    for turn in range(rounds):
        order = range(len(sessions))
        for index in order if turn % 2 == 0 else reversed(order):
            taken[index].append(timed(sessions[index], feeds, seconds))
    return taken


def layer(case: tuple[str, int, int, int, int, int], rounds: int, threads: int, seconds: float) -> str:
    """A line of the table."""
    kind, maps, out, n, side, tokens = case
    torch.manual_seed(0)
    of = (
        SharedConvTranspose2d(maps, out, n)
        if kind == "t"
        else SharedConv2d(maps, out, n, "same" if kind == "s" else "valid")
    )
    inputs = {"x": torch.randn(1, tokens, maps, side, side)}
    forms: list[nn.Module] = [of, SharedLinear(of, side)]
    if kind == "v" and n < side:
        forms.append(Windows(of, side))
    taken = turns([opened(form, inputs, threads) for form in forms], inputs, rounds, seconds)
    macs = [count(form, inputs["x"]).macs for form in forms]
    proof = reparameterize(of.eval(), inputs["x"], rules=["shared_conv"]).proof
    matrix = ratio(taken[1], taken[0])
    choice = "matrix" if proof.fused else "conv"
    wrong = matrix.median > 1.1 if proof.fused else matrix.median < 0.9
    windows = f"{ratio(taken[2], taken[0]).median:.2f}x" if len(forms) == 3 else ""
    name = {"v": "valid", "s": "same", "t": "transposed"}[kind]
    return (
        f"| {name} | {maps} -> {out} | {n} | {side} | {tokens} | {min(taken[0]) * 1e3:.0f} us "
        f"| {macs[1] / macs[0]:.2f}x | {forms[1].weight.numel():,} | {matrix} | {windows} "
        f"| {choice}{' (slower)' * wrong} |"
    )


def model(name: str, rounds: int, threads: int, seconds: float) -> str:
    """A line on a whole model, with all other rules in both forms."""
    built = build(recipe.resolve(name))
    inputs = built.random_inputs(0)
    others = [rule for rule in RULES if rule.name != "shared_conv"]
    forms = [reparameterize(built.model, tuple(inputs.values()), rules=rules).model for rules in (RULES, others)]
    taken = turns([opened(form, inputs, threads) for form in forms], inputs, rounds, seconds)
    weights = [sum(p.numel() for p in form.parameters()) for form in forms]
    return f"| {name} | {min(taken[1]):.2f} ms | {weights[1]:,} -> {weights[0]:,} | {ratio(taken[0], taken[1])} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers-only", action="store_true")
    parser.add_argument("--models-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.models_only:
        print("| padding | maps | N | M | T | conv | MACs | weights | matrix / conv | windows / conv | rule |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for case in LAYERS:
            print(layer(case, args.rounds, args.threads, args.seconds), flush=True)
    if not args.layers_only:
        print("\n| model | without the rule | parameters | with / without |\n|---|---|---|---|")
        for name in MODELS:
            print(model(name, args.rounds, args.threads, 4 * args.seconds), flush=True)


if __name__ == "__main__":
    main()
