"""Training through simulated planes: gradients, and what a few steps of fine-tuning do."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.device import Effects, Optics
from edgeattn.models.convsharevit import ConvShareViT, ConvShareViTConfig
from edgeattn.targets.optical.through import through
from tests.conftest import ROOT

PLANE = {"rows": 96, "cols": 80, "frame_rate_hz": 1e3}
NOISE = {"input_amplitude_bits": 4, "mask_amplitude_bits": 4, "full_well_e": 300, "adc_bits": 5}
#: Nothing but a convolution: as one, on planes (a mask shifted by nothing), as amplitudes that are subtracted.
OFF = {
    "convolution": Effects(),
    "planes": Effects(mask_shift_px=(0.0, 0.0)),
    "kernel_split": Effects(sign="kernel_split"),
    "kernel_split on planes": Effects(sign="kernel_split", mask_shift_px=(0.0, 0.0)),
    "reference on planes": Effects(sign="reference", mask_shift_px=(0.0, 0.0)),
}


class Small(nn.Module):
    """Each kind of layer that goes to the planes, strides and groups among them: (B, 2, 9, 9) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.back = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.last = nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.back(F.gelu(self.first(x)))).flatten(1))


Make = Callable[[], "tuple[nn.Module, Tensor, Tensor]"]


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Small(), torch.randn(6, 2, 9, 9), torch.arange(6) % 3


def shared() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    config = ConvShareViTConfig("v2", 8, 4, 1, 3, 1, 2, 2, kernel=3, num_classes=4)
    return ConvShareViT(config), torch.randn(4, 1, 8, 8), torch.arange(4) % 4


def gradients(model: nn.Module, x: Tensor, y: Tensor, effects: Effects | None = None) -> list[Tensor]:
    """Of every parameter and of the input, on planes where there are effects."""
    x = x.clone().requires_grad_(True)
    model.zero_grad()
    if effects is None:
        loss = F.cross_entropy(model(x), y)
    else:
        with through(Optics(**PLANE, effects=effects)):
            loss = F.cross_entropy(model(x), y)
    loss.backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("make", [small, shared])
@pytest.mark.parametrize("effects", OFF.values(), ids=OFF)
def test_without_effects_gradients_are_those_of_the_model(make: Make, effects: Effects) -> None:
    model, x, y = make()
    exact = gradients(model, x, y)
    whole = torch.cat([grad.flatten() for grad in exact]).norm()
    for seen, wanted in zip(gradients(model, x, y, effects), exact, strict=True):
        # That of a key's bias is zero, as softmax does not see it, and what is there is rounding.
        assert (seen - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * whole


@pytest.mark.parametrize("make", [small, shared])
@pytest.mark.parametrize("sign", ["reference", "offset", "kernel_split", "full_split"])
def test_with_effects_gradients_are_finite_and_not_zero(make: Make, sign: str) -> None:
    model, x, y = make()
    exact = gradients(model, x, y)
    noisy = gradients(model, x, y, Effects(sign=sign, **NOISE))
    for seen, wanted in zip(noisy, exact, strict=True):
        assert seen.isfinite().all()
        assert seen.any() or wanted.norm() < 1e-6
    flat, other = (torch.cat([grad.flatten() for grad in each[1:]]) for each in (noisy, exact))
    assert not torch.allclose(flat, other, rtol=1e-3)
    assert F.cosine_similarity(flat, other, dim=0) > 0.5  # they still point to where the loss falls


def test_outside_nothing_goes_through_planes() -> None:
    model, x, y = small()
    before = gradients(model, x, y)
    gradients(model, x, y, Effects(sign="kernel_split", **NOISE))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model, x, y), strict=True))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/finetune_optical.py, whose imports lie beside it."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("finetune_optical")


def test_a_few_steps_lower_the_loss_under_noise(example: ModuleType) -> None:
    torch.manual_seed(0)
    optics = Optics(**PLANE, effects=Effects(sign="kernel_split", **NOISE))
    # What is to be learned: which of three fixed patterns lies under the input.
    patterns = torch.randn(3, 2, 9, 9)
    labels = torch.arange(24) % 3
    samples = example.Samples(patterns[labels] + 0.5 * torch.randn(24, 2, 9, 9), labels)
    model = Small()

    def loss() -> float:
        with torch.no_grad(), through(optics, optics.effects.model_copy(update={"seed": example.TEST_SEED})):
            return float(F.cross_entropy(model(samples.x), samples.y))

    before = loss()
    taken = example.finetune(model, itertools.repeat(samples), optics, steps=20, rate=2e-2)
    assert len(taken) == 20
    assert loss() < 0.5 * before
    assert example.accuracy(model, samples, optics) > 0.8


def test_noise_of_the_test_is_the_same_every_time(example: ModuleType) -> None:
    model, x, y = small()
    samples = example.Samples(x, y)
    optics = Optics(**PLANE, effects=Effects(sign="kernel_split", **NOISE))
    assert example.accuracy(model, samples, optics, 4) == example.accuracy(model, samples, optics, 4)
    assert example.accuracy(model, samples, None) == float((model(x).argmax(1) == y).float().mean())
