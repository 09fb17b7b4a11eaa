"""Train a small FMViT on cluttered scenes of two digits: ``python examples/train_scenes.py``.

A harder task than examples/train_digits.py, from what scikit-learn carries (its two photographs need Pillow). A scene
shows two handwritten digits of different size, turned, brighter or darker than what is behind them, on a patch of a
photograph, blurred and noisy. The answer is the larger digit and its side: digit + 10 * (1 if it is the right one),
20 classes. Half an hour on one busy CPU core. Writes what the recipe ``fmvit-scenes`` and the tests use:

    recipes/checkpoints/fmvit-scenes.safetensors     weights (training form); the metadata says how they came about
    recipes/data/scenes-heldout.npz                  x uint8 (1500, 1, 32, 64), y int64 (1500,): never trained on
    recipes/data/scenes-calibration.npz              x uint8 (256, 1, 32, 64): scenes as they were trained on

Held-out scenes are made of digits and of parts of the photographs that no training scene shows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from train_digits import CALIBRATION, load_images, options_of, schedule_of, write_checkpoint, write_samples

from edgeattn.models.fmvit import FMViT, fmvit_scenes

MEAN, STD = 0.4216, 0.2314
"""Mean and standard deviation of the calibration scenes, divided by 255."""

HEIGHT, WIDTH = 32, 64
"""Size of a scene in pixels."""

HELDOUT = 1500
"""Held-out scenes: 0.1 percentage points are one or two of them."""

SPLIT = 448
"""Training scenes take the columns of the photographs (640 wide) below this one, held-out scenes the others."""

LEVELS = 32
"""Gray levels of a scene: noise in finer steps would only make the files larger."""


@dataclass
class Scenes:
    """A source of scenes, the same for the same seed.

    Attributes:
        digits: uint8 (N, 1, 32, 32). labels: int64 (N,).
        photos: float32 (2, 1, height, width), 0 to 1.
        generator: of everything random.
    """

    digits: Tensor
    labels: Tensor
    photos: Tensor
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Random numbers between ``low`` and ``high``."""
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def integers(self, high: int, *shape: int) -> Tensor:
        """Random integers from 0 to ``high - 1``."""
        return torch.randint(high, shape, generator=self.generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` scenes: uint8 (count, 1, HEIGHT, WIDTH), and their classes, int64 (count,)."""
        scene = self._backgrounds(count)
        chosen = self.integers(len(self.labels), 2, count)  # the left digits, then the right ones
        right = self.integers(2, count)
        large = self.uniform(18.0, 28.0, count)
        small = large * self.uniform(0.5, 0.8, count)
        for side in (0, 1):
            ink = self._placed(chosen[side], torch.where(right == side, large, small), 16.0 + 32.0 * side)
            tone = self.uniform(0.25, 0.7, count) * (self.integers(2, count) * 2 - 1)
            scene = scene + ink * tone.view(-1, 1, 1, 1)
        scene = self._spoiled(scene.clamp(0.0, 1.0))
        step = 255.0 / (LEVELS - 1)
        images = ((scene * (LEVELS - 1)).round() * step).round().to(torch.uint8)
        return images, self.labels[chosen[right, torch.arange(count)]] + 10 * right

    def _backgrounds(self, count: int) -> Tensor:
        """Patches of the photographs in four sizes, with less contrast: 0.1 to 0.9."""
        patches = []
        draws = zip(self.integers(2, count).tolist(), self.integers(4, count).tolist(), strict=True)
        for photo, scale in draws:
            height, width = ((24, 48), (32, 64), (48, 96), (64, 128))[scale]
            top = int(self.integers(self.photos.shape[-2] - height + 1, 1))
            left = int(self.integers(self.photos.shape[-1] - width + 1, 1))
            patch = self.photos[photo : photo + 1, :, top : top + height, left : left + width]
            patches.append(F.interpolate(patch, size=(HEIGHT, WIDTH), mode="bilinear", antialias=True))
        scenes = torch.cat(patches)
        level = scenes.mean((1, 2, 3), keepdim=True)
        contrast = self.uniform(0.5, 1.0, count, 1, 1, 1)
        return (level + (scenes - level) * contrast) * 0.8 + 0.1

    def _placed(self, chosen: Tensor, size: Tensor, center_x: float) -> Tensor:
        """The chosen digits as ink of 0 to 1 in a scene: ``size`` pixels wide, about ``center_x``, turned a little."""
        count = len(chosen)
        angle = self.uniform(-20.0, 20.0, count) * (math.pi / 180.0)
        x = center_x - WIDTH / 2 + self.uniform(-4.0, 4.0, count)  # of the digit's center, in pixels from the scene's
        y = self.uniform(-4.0, 4.0, count)
        # affine_grid maps the scene's coordinates to the digit's; both run from -1 to 1 over a side.
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        rows = [
            torch.stack([cos * WIDTH, -sin * HEIGHT, 2.0 * (sin * y - cos * x)], 1),
            torch.stack([sin * WIDTH, cos * HEIGHT, -2.0 * (sin * x + cos * y)], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, HEIGHT, WIDTH], align_corners=False)
        return F.grid_sample(self.digits[chosen].float() / 255.0, grid, align_corners=False)

    def _spoiled(self, scene: Tensor) -> Tensor:
        """Blurred, from not at all to a standard deviation of about 1.2 pixels, then noisy."""
        count = len(scene)
        taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / 1.2) ** 2)
        taps = taps / taps.sum()
        padded = F.pad(scene, (3, 3, 3, 3), mode="replicate")
        blurred = F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, 7)), taps.view(1, 1, 7, 1))
        scene = scene + (blurred - scene) * self.uniform(0.0, 1.0, count, 1, 1, 1)
        noise = torch.randn(scene.shape, generator=self.generator)
        return (scene + noise * self.uniform(0.01, 0.08, count, 1, 1, 1)).clamp(0.0, 1.0)


def sources(seed: int) -> tuple[Scenes, Scenes, Scenes]:
    """Scenes to train on, to calibrate with (of the same digits and photographs) and to hold out."""
    train, train_labels, test, test_labels = load_images(seed)
    gray = np.stack([image @ np.array([0.299, 0.587, 0.114]) for image in load_sample_images().images])
    photos = torch.from_numpy(gray).float().unsqueeze(1) / 255.0

    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(3 * seed + number)

    return (
        Scenes(train, train_labels, photos[..., :SPLIT], generator(0)),
        Scenes(train, train_labels, photos[..., :SPLIT], generator(1)),
        Scenes(test, test_labels, photos[..., SPLIT:], generator(2)),
    )


def normalize(images: Tensor) -> Tensor:
    """uint8 0 to 255 -> float32 of about zero mean and unit variance."""
    return (images.float() / 255.0 - MEAN) / STD


@torch.no_grad()
def accuracy(model: FMViT, images: Tensor, labels: Tensor) -> float:
    """Share of right top-1 answers; leaves the model in eval mode."""
    model.eval()
    answers = torch.cat([model(normalize(part)).argmax(1) for part in images.split(100)])
    return float((answers == labels).float().mean())


def train(model: FMViT, scenes: Scenes, steps: int, batch: int) -> None:
    """Minimize the cross entropy with label smoothing 0.05 over scenes that are all new, in place."""
    optimizer, schedule = schedule_of(model, steps)
    model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    start, total, right = time.monotonic(), 0.0, 0
    model.train()
    for step in range(1, steps + 1):
        images, labels = scenes.draw(batch)
        logits = model(normalize(images).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total, right = total + float(loss.detach()), right + int((logits.argmax(1) == labels).sum())
        if step % 100 == 0 or step == steps:
            shown = (step - 1) % 100 + 1
            spent = time.monotonic() - start
            print(
                f"step {step:5d}/{steps}  loss {total / shown:.4f}  right {right / shown / batch:.3f}  {spent:5.0f} s",
                flush=True,
            )
            total, right = 0.0, 0


def main() -> None:
    """Train, measure on the held-out scenes once, and write the files."""
    parser = options_of("Train fmvit_scenes on scenes made of scikit-learn's digits and photographs.")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, calibration, heldout = sources(args.seed)
    images, _ = calibration.draw(CALIBRATION)
    x_test, y_test = heldout.draw(HELDOUT)
    pixels = images.float() / 255.0
    print(f"scenes of mean {pixels.mean():.4f} and std {pixels.std():.4f}, {HELDOUT} held out")
    write_samples(args.out / "data" / "scenes-calibration.npz", x=images)
    write_samples(args.out / "data" / "scenes-heldout.npz", x=x_test, y=y_test)
    if args.data_only:
        return

    model = fmvit_scenes()
    train(model, training, args.steps, args.batch)
    score = accuracy(model, x_test, y_test)
    print(f"held-out accuracy {score:.4f} ({round(score * len(y_test))} of {len(y_test)})")
    facts = {
        "model": "edgeattn.models.fmvit:fmvit_scenes",
        "data": "scenes of two digits (sklearn.datasets.load_digits) on patches of load_sample_images, 32x64 uint8; "
        "held-out scenes of the 20 % of the digits and the columns of the photographs that were not trained on",
        "classes": "the larger digit + 10 * (1 if it is the right one)",
        "preprocessing": "(x / 255 - mean) / std",
        "mean": str(MEAN),
        "std": str(STD),
        "seed": str(args.seed),
        "steps": str(args.steps),
        "batch": str(args.batch),
        "test_accuracy": f"{score:.4f}",
        "test_images": str(len(y_test)),
    }
    write_checkpoint(args.out / "checkpoints" / "fmvit-scenes.safetensors", model, facts)


if __name__ == "__main__":
    main()
