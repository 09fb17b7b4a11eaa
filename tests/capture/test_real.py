"""Complex numbers that are only carried along become pairs of real ones; others stay, and are left to the targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgeattn.capture import capture, run_eager


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self.inner(x))


def rotary(x: Tensor) -> Tensor:
    """As Llama's and DeepSeek-V2's own code have it, (B, H, T, R)."""
    angles = torch.outer(torch.arange(x.shape[-2]).float(), 10.0 ** -torch.arange(0, 1, 2 / x.shape[-1]))
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(0)
    return torch.view_as_real(turned).flatten(3)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "rotary": rotary,
    "by a number": lambda x: torch.view_as_real(pairs(x) * 0.5),
    "by real numbers": lambda x: torch.view_as_real(x[..., :1] * pairs(x)),
    "sums": lambda x: torch.view_as_real(pairs(x) + pairs(x.flip(2)) - pairs(x) * pairs(x)),
    "conjugate": lambda x: torch.view_as_real((pairs(x) * pairs(x).conj()).resolve_conj()),
    "parts": lambda x: pairs(x).real + 2 * pairs(x).imag,
    "absolute": lambda x: pairs(x).abs(),
    "negative axes": lambda x: torch.view_as_real(pairs(x).transpose(-1, -2).unsqueeze(-1)),
    "made of parts": lambda x: torch.view_as_real(torch.complex(x, x * 2) * torch.complex(x, -x)),
}


def complex_nodes(program: torch.export.ExportedProgram) -> int:
    values = [node.meta.get("val") for node in program.graph.nodes]
    return sum(isinstance(value, Tensor) and value.is_complex() for value in values)


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_real_numbers_compute_the_same(name: str) -> None:
    model = Computes(CASES[name]).eval()
    inputs = {"x": torch.randn(1, 2, 5, 8)}
    entry = capture(model, inputs, ("y",)).entries["main"]
    assert complex_nodes(entry.graph) == 0
    wanted = run_eager(model, inputs, ("y",))["y"]
    (found,) = entry.graph.module()(inputs["x"])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert complex_nodes(entry.graph.run_decompositions({})) == 0


def test_what_is_more_than_carried_along_stays() -> None:
    """A Fourier transform is no pair of products: lint and converters speak of it."""
    model = Computes(lambda x: torch.fft.rfft(x).abs()).eval()
    entry = capture(model, {"x": torch.randn(1, 2, 5, 8)}, ("y",)).entries["main"]
    assert complex_nodes(entry.graph) > 0
    (found,) = entry.graph.module()(x := torch.randn(1, 2, 5, 8))
    assert torch.allclose(found, torch.fft.rfft(x).abs())


def test_added_operations_belong_to_the_module() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope = Computes(rotary)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.rope(x) + 1
            return out

    entry = capture(Around().eval(), {"x": torch.randn(1, 2, 5, 8)}, ("y",)).entries["main"]
    products = [n for n in entry.graph.graph.nodes if n.target is torch.ops.aten.cos.default]
    assert products
    assert all(next(reversed(n.meta["nn_module_stack"].values()))[0] == "rope" for n in products)
