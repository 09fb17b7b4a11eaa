"""Train the small FMViT on scikit-learn's handwritten digits: ``python examples/train_digits.py``.

A few minutes on two CPU cores. Writes the checkpoint (training form) and the images that the recipe ``fmvit-digits``
and the tests use:

    recipes/checkpoints/fmvit-digits.safetensors     weights; the file's metadata says how they came about
    recipes/data/digits-heldout.npz                  x uint8 (N, 1, 32, 32), y int64 (N,): never trained on
    recipes/data/digits-calibration.npz              x uint8 (256, 1, 32, 32): training images, as they are

Preprocessing of the model's input: (x / 255 - MEAN) / STD.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from edgeattn.models.fmvit import FMViT, fmvit_digits

MEAN, STD = 0.3054, 0.3237
"""Mean and standard deviation of the training images, upsampled and divided by 255."""

CALIBRATION = 256
"""Images of the training set that the ranges of quantized data are chosen from."""

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then held-out ones (20 %, stratified): uint8 (N, 1, 32, 32) and int64 (N,)."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) * (255.0 / 16.0)  # 8 x 8 pixels of 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=seed, shuffle=True
    )
    labels = torch.from_numpy(digits.target).long()
    return images[train], labels[train], images[test], labels[test]


def normalize(images: Tensor) -> Tensor:
    """uint8 0 to 255 -> float32 of about zero mean and unit variance."""
    return (images.float() / 255.0 - MEAN) / STD


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotations of up to 12 degrees, shifts of up to 2.5 pixels and scales of 0.9 to 1.1, an image each."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2.0 - 1.0) * limit

    angle, scale = uniform(12.0 * math.pi / 180.0), 1.0 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = uniform(2.5 / 16.0), uniform(2.5 / 16.0)  # the grid spans -1 to 1 over 32 pixels
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")


@torch.no_grad()
def accuracy(model: FMViT, images: Tensor, labels: Tensor) -> float:
    """Share of right top-1 answers; leaves the model in eval mode."""
    model.eval()
    return float((model(normalize(images)).argmax(1) == labels).float().mean())


def schedule_of(model: FMViT, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, with weight decay on matrices alone, and its one-cycle learning rate over ``steps`` steps."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)


def train(model: FMViT, images: Tensor, labels: Tensor, epochs: int, batch: int, generator: torch.Generator) -> None:
    """Minimize the cross entropy with label smoothing 0.05, in place."""
    steps = len(images) // batch  # the last, short batch is dropped
    optimizer, schedule = schedule_of(model, epochs * steps)
    start = time.monotonic()
    for epoch in range(epochs):
        model.train()
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            logits = model(augment(normalize(images[chosen]), generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.4f}  {time.monotonic() - start:5.0f} s", flush=True)


def write_samples(path: Path, **arrays: Tensor) -> None:
    """Write samples as a compressed .npz, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: array.numpy() for name, array in arrays.items()})
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def write_checkpoint(path: Path, model: FMViT, facts: dict[str, str]) -> None:
    """Write the weights, with the facts, the date and torch's version as the file's metadata, and say so."""
    facts = {
        **facts,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata=facts)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def options_of(description: str) -> argparse.ArgumentParser:
    """What both examples are told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-only", action="store_true", help="write the held-out and calibration images alone")
    parser.add_argument(
        "--out", type=Path, default=RECIPES, help="folder of checkpoints/ and data/ (default: recipes/)"
    )
    return parser


def main() -> None:
    """Train, measure on the held-out images once, and write the files."""
    parser = options_of("Train fmvit_digits on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    x_train, y_train, x_test, y_test = load_images(args.seed)
    pixels = x_train.float() / 255.0
    print(f"{len(x_train)} training images (mean {pixels.mean():.4f}, std {pixels.std():.4f}), {len(x_test)} held out")
    write_samples(args.out / "data" / "digits-heldout.npz", x=x_test, y=y_test)
    # The split has shuffled them: the first images are a fair sample.
    write_samples(args.out / "data" / "digits-calibration.npz", x=x_train[:CALIBRATION])
    if args.data_only:
        return

    model = fmvit_digits()
    train(model, x_train, y_train, args.epochs, args.batch, torch.Generator().manual_seed(args.seed))
    score = accuracy(model, x_test, y_test)
    print(f"held-out accuracy {score:.4f} ({round(score * len(y_test))} of {len(y_test)})")
    facts = {
        "model": "edgeattn.models.fmvit:fmvit_digits",
        "data": "sklearn.datasets.load_digits, 8x8 upsampled bilinear to 32x32 uint8, 80/20 stratified split",
        "preprocessing": "(x / 255 - mean) / std",
        "mean": str(MEAN),
        "std": str(STD),
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "batch": str(args.batch),
        "test_accuracy": f"{score:.4f}",
        "test_images": str(len(y_test)),
    }
    write_checkpoint(args.out / "checkpoints" / "fmvit-digits.safetensors", model, facts)


if __name__ == "__main__":
    main()
