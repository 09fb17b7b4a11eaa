"""What a package says of itself: author, recipe, hashes, labels; and no trace of the machine that it was made on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeattn.targets.base import LowerPlan
from edgeattn.targets.coreml.mil.package import MODULES

#: Before our own keys in the metadata.
PREFIX = "edgeattn."


def describe(model: Any, plan: LowerPlan, modules: Mapping[str, str]) -> None:
    """Fill a converted model's metadata.

    Args:
        modules: what ``note_modules`` gives, by function; "" for the only one.
    """
    weights = plan.metadata.get("weights", "")
    model.author = plan.metadata.get("author", "") or "unknown"
    made = f"made by EdgeAttn {plan.metadata.get('edgeattn', '')}"
    random = "; weights are random: nothing was trained" if weights == "random" else ""
    model.short_description = f"{plan.metadata.get('recipe', 'model')}, {plan.precision}, {made}{random}"
    model.version = plan.metadata.get("recipe_sha256", "")[:12]
    own = {**plan.metadata, "precision": plan.precision, **plan.options}
    if plan.labels:
        own["labels"] = json.dumps(list(plan.labels), ensure_ascii=False)
    for key, value in own.items():
        model.user_defined_metadata[f"{PREFIX}{key}"] = value
    for function, noted in modules.items():
        model.user_defined_metadata[f"{MODULES}.{function}" if function else MODULES] = noted
