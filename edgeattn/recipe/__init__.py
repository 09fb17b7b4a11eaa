"""Recipes: what to build. A TOML file, or one made up on the spot for a model from outside."""

from edgeattn.recipe.resolve import FACTORY_NAMES, TOKENIZER, load, resolve, with_samples
from edgeattn.recipe.schema import (
    CalibrationSpec,
    DecoderSpec,
    Heldout,
    InputSpec,
    Keep,
    ModelSpec,
    Preprocess,
    Quantization,
    Recipe,
    Resolved,
    preprocessed,
)

__all__ = [
    "FACTORY_NAMES",
    "TOKENIZER",
    "CalibrationSpec",
    "DecoderSpec",
    "Heldout",
    "InputSpec",
    "Keep",
    "ModelSpec",
    "Preprocess",
    "Quantization",
    "Recipe",
    "Resolved",
    "load",
    "preprocessed",
    "resolve",
    "with_samples",
]
