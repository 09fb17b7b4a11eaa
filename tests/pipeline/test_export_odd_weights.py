"""Weights as trained models have them in places: switched off, empty, tiny, or with layers one right behind another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeattn

TARGETS = ["onnx", "tflite", "coreml", "tensorrt"]


class SwitchedOff(nn.Module):
    """A third of the channels live by their bias: the batch norm before has next to no slope, or none."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(3, 32, 1, 3), (32, 32, 32, 3), (32, 64, 1, 1), (64, 64, 64, 3), (64, 32, 1, 1)]
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, bias=False),
                    nn.BatchNorm2d(cout),
                    nn.ReLU(),
                )
                for cin, cout, groups, kernel in plan
            )
        )
        self.head = nn.Linear(32, 10)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            with torch.no_grad():
                assert norm.running_var is not None
                norm.running_var.uniform_(0.05, 0.2)
                norm.bias.normal_(0, 0.3)
                norm.weight[::3] = 1e-9
                norm.weight[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


class Pruned(nn.Module):
    """Products one behind another, with empty blocks and rows, tiny rows, and weights that are all tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        with torch.no_grad():
            self.a.weight[:, :32] = 0
            self.a.weight[5] = 0
            self.b.weight *= 1e-6
            self.c.weight[3:7] *= 1e-6
            self.d.weight[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(self.c(x + self.b(torch.relu(self.a(x)))))
        return out


def worst(model: str, shape: str, target: str, precision: str, output: Path) -> float:
    """Largest relative L2 of an export."""
    bundle = edgeattn.export(f"{__file__}:{model}", target, precision, output, inputs=[f"x={shape}"])
    samples = {k: v for k, v in bundle.manifest.numerics.items() if k != "reference"}
    return max(numerics["relative_l2"] for sample in samples.values() for numerics in sample.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_channels_that_live_by_their_bias(target: str, tmp_path: Path) -> None:
    assert worst("SwitchedOff", "1x3x16x16", target, "w8a8", tmp_path) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["w8a8", "w4"])
@pytest.mark.parametrize("target", TARGETS)
def test_empty_and_tiny_weights(target: str, precision: str, tmp_path: Path) -> None:
    assert worst("Pruned", "4x64", target, precision, tmp_path) < {"w8a8": 0.05, "w4": 0.2}[precision]
