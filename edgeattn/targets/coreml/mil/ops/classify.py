"""What a classifier gives: a label, and the probability of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op


@op("classify")
def classify(probabilities: Tensor, classes: Any) -> tuple[str | int, dict[str | int, float]]:
    """The most probable label, the first of equal ones, and the probabilities by label.

    Args:
        probabilities: as many numbers as classes, of any shape.
        classes: a list of texts, or of single integers as arrays.
    """
    labels: list[str | int] = [item if isinstance(item, str) else int(item) for item in classes]
    numbers = probabilities.flatten()
    return labels[int(numbers.argmax())], dict(zip(labels, numbers.tolist(), strict=True))
