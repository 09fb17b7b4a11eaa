"""Fine-tune a trained model through the planes of a noisy 4f correlator, and see what that gives.

    python examples/finetune_optical.py                       # about 4 minutes on one CPU core
    python examples/finetune_optical.py --recipe vit-digits   # any recipe of the digits
    python examples/finetune_optical.py --device optical-4f-lcos-1khz --steps 20

The device of the example is a bad one on purpose: modulators of 4 bits, a camera of 6 bits whose pixels hold 1000
electrons, signs by showing positive and negative parts of kernels and inputs one after the other. Everything that a
convolution or linear layer computes goes through its simulated planes, in training as in the test: levels are rounded,
electrons counted with their noise, square roots taken. What rounds or is random passes gradients straight through.

Prints accuracy on the held-out digits before and after, on ideal planes (which are the model itself) and on noisy
ones; and, as a control, after the same steps without the planes. The test has other noise than the training. Images and
split are those of examples/train_digits.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import augment, load_images, normalize, write_checkpoint

from edgeattn import device, recipe
from edgeattn.device import Effects, Optics
from edgeattn.models.build import build
from edgeattn.targets.optical.through import through

#: The device of the example. Small planes are as good as large ones here, and faster to simulate.
NOISY = Optics(
    rows=256,
    cols=256,
    frame_rate_hz=1e3,
    effects=Effects(
        sign="kernel_split",
        input_amplitude_bits=4,
        mask_amplitude_bits=4,
        mask_phase_bits=4,
        full_well_e=1e3,
        adc_bits=6,
    ),
)

#: Of the noise of the tests; that of the training starts from the device's own seed.
TEST_SEED = 12345


@dataclass(frozen=True)
class Samples:
    """Images as the model takes them, (N, 1, 32, 32) float32, and their labels, (N,) int64."""

    x: Tensor
    y: Tensor


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples, optics: Optics | None, batch: int = 40) -> float:
    """Share of right top-1 answers in eval mode, through the planes of ``optics``, or as PyTorch computes it."""
    model.eval()
    if optics is None:
        return float((model(samples.x).argmax(1) == samples.y).float().mean())
    right = 0
    with through(optics, optics.effects.model_copy(update={"seed": TEST_SEED})):
        for x, y in zip(samples.x.split(batch), samples.y.split(batch), strict=True):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(samples.y)


def batches(images: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[Samples]:
    """Endless augmented batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            yield Samples(augment(normalize(images[chosen]), generator), labels[chosen])


def finetune(
    model: nn.Module, stream: Iterator[Samples], optics: Optics | None, steps: int, rate: float
) -> list[float]:
    """Minimize the cross entropy through the planes of ``optics``, or without, in place; returns the loss of each step.

    AdamW, one-cycle learning rate. Gradients are clipped: behind a square root those of a dark pixel are large.

    Args:
        rate: the largest learning rate.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    # One for all steps: its noise goes on, and never repeats.
    planes = contextlib.nullcontext() if optics is None else through(optics)
    losses, start = [], time.monotonic()
    for step in range(steps):
        samples = next(stream)
        with planes:
            loss = F.cross_entropy(model(samples.x), samples.y, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if optics is not None and ((step + 1) % 10 == 0 or step + 1 == steps):
            last = losses[-10:]
            spent = time.monotonic() - start
            print(f"step {step + 1:3d}/{steps}  loss {sum(last) / len(last):.3f}  {spent:4.0f} s", flush=True)
    return losses


def report(what: str, model: nn.Module, test: Samples, optics: Optics) -> tuple[float, float]:
    """Prints and returns accuracy on ideal and on noisy planes."""
    ideal, noisy, count = accuracy(model, test, None), accuracy(model, test, optics), len(test.y)
    print(
        f"{what}: held-out accuracy {ideal:.4f} ideal ({round(ideal * count)} of {count}), "
        f"{noisy:.4f} noisy ({round(noisy * count)} of {count})",
        flush=True,
    )
    return ideal, noisy


def main() -> None:
    """Measure, fine-tune, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="convsharevit-v2-digits", help="of a model for digits, with a checkpoint")
    parser.add_argument("--device", help="an optical device, instead of the noisy one of this example")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the fine-tuned weights to this .safetensors file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    optics = NOISY
    if args.device:
        found = device.resolve(args.device).optics
        if found is None:
            parser.error(f"{args.device} is no optical device")
        optics = found
    model = build(recipe.resolve(args.recipe)).model
    x_train, y_train, x_test, y_test = load_images(0)
    test = Samples(normalize(x_test), y_test)
    report("before", model, test, optics)
    control = copy.deepcopy(model)
    for what, tuned, planes in (("without the planes", control, None), ("through the planes", model, optics)):
        finetune(tuned, batches(x_train, y_train, args.batch, args.seed), planes, args.steps, args.rate)
        ideal, noisy = report(f"after {args.steps} steps {what}", tuned, test, optics)
    if args.out:
        facts = {
            "recipe": args.recipe,
            "fine-tuned": f"through simulated planes, {args.steps} steps of {args.batch} images, rate {args.rate}",
            "optics": optics.model_dump_json(exclude_none=True),
            "test_accuracy": f"{ideal:.4f}",
            "noisy_test_accuracy": f"{noisy:.4f}",
        }
        write_checkpoint(args.out, model, facts)


if __name__ == "__main__":
    main()
