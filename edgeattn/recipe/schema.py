"""What a recipe may say, and a recipe with its files found."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import numpy as np
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgeattn.core import schema
from edgeattn.core.hashing import sha256_data
from edgeattn.core.numerics import Array
from edgeattn.core.specs import DTYPES, LARGEST, Ranges, TensorSpec, dynamic_fault, range_fault

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ModelSpec(schema.Strict):
    """Where the ``nn.Module`` comes from.

    Attributes:
        factory: ``package.module:callable``, ``path/to/file.py:callable`` or ``timm:NAME``.
        args: keyword arguments of the callable.
        checkpoint: .safetensors (or .pth, read without executing it), or a folder in Hugging Face's layout; relative
            to the recipe file.
    """

    factory: str
    args: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = Field(default=None, min_length=1)

    @field_validator("factory")
    @classmethod
    def _has_both_parts(cls, value: str) -> str:
        if not re.fullmatch(r"[^:]+:[^:]+", value):
            raise ValueError("must be package.module:callable, path/to/file.py:callable or timm:NAME")
        return value


class InputSpec(schema.Strict):
    """Shape, dtype and random range of one input; see ``core.specs.TensorSpec``.

    Attributes:
        dynamic: (min, opt, max), or with a step as a fourth, of the dimensions that may vary, by axis; opt is the
            shape's own number.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    dynamic: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @field_validator("shape")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in value):
            raise ValueError("every dimension must be at least 1")
        if math.prod(value) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} elements")
        return value

    @field_validator("dynamic", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return (
            {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()} if isinstance(value, dict) else value
        )

    @field_validator("dynamic")
    @classmethod
    def _varies(cls, value: dict[str, tuple[int, ...]], info: ValidationInfo) -> dict[str, tuple[int, ...]]:
        if strange := [axis for axis in value if not axis.isascii() or not axis.isdigit() or axis != str(int(axis))]:
            raise ValueError(f"axis {strange[0]!r}: an axis is a number from 0")
        shape = info.data.get("shape")  # absent where it is wrong itself
        if shape is not None and (fault := dynamic_fault(shape, {int(axis): ends for axis, ends in value.items()})):
            raise ValueError(fault)
        return value

    @model_serializer(mode="wrap")
    def _terse(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ranges as if there were none to give: digests and keys of static recipes stay what they were."""
        data: dict[str, Any] = plain(self)
        if not self.dynamic:
            del data["dynamic"]
        return data

    @property
    def ranges(self) -> Ranges:
        """The dimensions that may vary, as in ``core.specs.TensorSpec``."""
        return tuple(sorted((int(axis), *ends) for axis, ends in self.dynamic.items()))

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _range(self) -> InputSpec:
        if fault := range_fault(self.dtype, self.low, self.high):
            raise ValueError(fault)
        return self


class Preprocess(schema.Strict):
    """From a raw image to the first input: ``(raw * scale - mean) / std`` for each channel of (B, C, H, W).

    Attributes:
        scale: factor on the raw values, such as 1/255.
        mean, std: one value a channel, after scaling.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def preprocessed(raw: Array, preprocess: Preprocess | None) -> Array:
    """Raw values (N, C, ...) as the model takes them, in float32."""
    values = raw.astype(np.float32)
    if preprocess is None:
        return values
    per_channel = (1, -1) + (1,) * (values.ndim - 2)
    mean, std = (np.asarray(v, np.float32).reshape(per_channel) for v in (preprocess.mean, preprocess.std))
    scaled: Array = (values * np.float32(preprocess.scale) - mean) / std
    return scaled


class Heldout(schema.Strict):
    """Samples that the model has not seen in training; every export is scored on them where they have labels.

    Attributes:
        file: .npz relative to the recipe, with ``x`` (N, ...) raw values and, to be scored, ``y`` (N,) class numbers.
        golden: how many of the samples become golden inputs of a bundle.
    """

    file: str
    golden: int = Field(default=4, ge=1, le=64)


class Keep(schema.Strict):
    """Modules that stay in a higher precision than the one asked for.

    Attributes:
        modules: dotted paths of the deploy form, or globs of them; what is inside a module is meant with it.
        at: ``float``, or ``w8`` for weights in 8 bits with data in floats.
        precisions, targets: where that holds; everywhere if empty.
        why: found by what; a sentence for the user.
    """

    modules: tuple[str, ...] = Field(min_length=1)
    at: Literal["float", "w8"] = "float"
    precisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    why: str = ""


class Quantization(schema.Strict):
    """How the model is quantized, where a precision asks for it.

    Attributes:
        group: weights in 4 bits that share a scale. observer: how ranges of activations are chosen, see
            ``quant.observe.METHODS``.
        equalize: even out the ranges of channels between two layers first. correct: put the mean error of rounded
            weights into the biases.
    """

    group: Literal[32, 64, 128] = 32
    observer: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    equalize: bool = True
    correct: bool = True
    keep: tuple[Keep, ...] = ()

    @field_validator("keep", mode="before")
    @classmethod
    def _tables(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class CalibrationSpec(schema.Strict):
    """What ranges of activations are measured on.

    Attributes:
        source: a folder of images, a .npy or .npz file, or ``package.module:function`` (``file.py:function``) that
            yields samples; relative to the recipe.
        samples: at most so many are used, a subset drawn with ``seed`` where there are more.
    """

    source: str = Field(min_length=1)
    samples: int = Field(default=128, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class DecoderSpec(schema.Strict):
    """How a language model is exported: entries ``decode`` and ``prefill_N`` behind a cache that the runtime keeps.

    Attributes:
        context: tokens that the cache holds. prefill: how many tokens a ``prefill_N`` takes at once.
        buckets: lengths of the cache, below ``context``, that targets with fixed shapes get entries for as well.
        text: held-out text (UTF-8, relative) that logits and perplexity are compared on; random tokens without one.
        tokenizer: folder with a ``tokenizer.json``, relative, for checkpoints that have none of their own.
        steps: tokens that are decoded one by one in the comparison. greedy: length of the continuation that must be
            the same in float32.
    """

    context: int = Field(ge=2, le=1 << 20)
    prefill: tuple[int, ...] = (128,)
    buckets: tuple[int, ...] = ()
    text: str | None = Field(default=None, min_length=1)
    tokenizer: str | None = Field(default=None, min_length=1)
    steps: int = Field(default=2000, ge=16, le=100_000)
    greedy: int = Field(default=64, ge=1, le=1024)

    @field_validator("prefill", "buckets", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("prefill", "buckets")
    @classmethod
    def _sizes(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or any(n < 2 for n in value):
            raise ValueError("must be numbers from 2, each larger than the one before")
        if value and value[-1] > info.data.get("context", value[-1]):
            raise ValueError(f"{value[-1]} is more than the context")
        return value

    @field_validator("prefill")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("needs at least one size, as [128]")
        return value


class Recipe(schema.Strict):
    """A model, its inputs and outputs, and what its exports are scored on.

    Attributes:
        decoder: of a language model that is exported with a cache; its one input has the token numbers.
        labels: names of the classes, in the order of the first output's columns. author: for the artifact's metadata.
    """

    name: str
    description: str = ""
    model: ModelSpec
    inputs: dict[str, InputSpec] = Field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] = ()
    author: str = ""
    heldout: Heldout | None = None
    calibration: CalibrationSpec | None = None
    quant: Quantization = Field(default_factory=Quantization)
    decoder: DecoderSpec | None = None

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("may hold letters, digits, '.', '_' and '-' only, for it names files")
        return value

    @field_validator("inputs")
    @classmethod
    def _named(cls, value: dict[str, InputSpec]) -> dict[str, InputSpec]:
        if not all(value):
            raise ValueError("every input needs a name")
        return value

    @model_validator(mode="after")
    def _has_inputs(self) -> Recipe:
        if not self.inputs and not self.model.factory.startswith("timm:"):
            raise ValueError("needs at least one input, such as [inputs.x] with shape = [1, 3, 224, 224]")
        return self

    @field_validator("outputs")
    @classmethod
    def _distinct(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(set(value)) != len(value) or not all(value):
            raise ValueError("every output needs a name of its own")
        if taken := set(value) & set(info.data.get("inputs", ())):
            raise ValueError(f"{', '.join(sorted(taken))} is the name of an input already")
        return value

    @model_serializer(mode="wrap")
    def _terse(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Digests of recipes without a decoder stay what they were."""
        data: dict[str, Any] = plain(self)
        if self.decoder is None:
            del data["decoder"]
        return data

    def specs(self) -> list[TensorSpec]:
        """The inputs in order."""
        return [TensorSpec(name, s.shape, s.dtype, s.low, s.high, s.ranges) for name, s in self.inputs.items()]


class Resolved(schema.Strict):
    """A recipe with its files found: what a job of the pipeline is made from.

    Attributes:
        folder: where relative factory paths are looked up.
        checkpoint, heldout, text: the files (a folder may be a checkpoint) and the SHA-256 of their bytes.
        tokenizer: the folder with a language model's ``tokenizer.json``. tokenizer_sha256: of its files.
        unscored: why the recipe's held-out samples are not used, if they are not.
        calibration: where the calibration samples come from, a path made absolute. calibration_sha256: of a file's
            bytes, or of the names, sizes and times of a folder's files; None where a function of a module yields them.
    """

    recipe: Recipe
    folder: str
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    heldout: str | None = None
    heldout_sha256: str | None = None
    unscored: str | None = None
    calibration: str | None = None
    calibration_sha256: str | None = None
    text: str | None = None
    text_sha256: str | None = None
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None

    @property
    def random_weights(self) -> bool:
        """True when there is no checkpoint, hence nothing that was trained."""
        return self.checkpoint is None

    @property
    def sha256(self) -> str:
        """Digest of the recipe's content and of its files' bytes; paths do not count."""
        content = self.recipe.model_dump(mode="json")
        content["model"]["checkpoint"] = self.checkpoint_sha256
        if content["heldout"]:
            content["heldout"]["file"] = self.heldout_sha256
        if content["calibration"] and self.calibration_sha256:
            content["calibration"]["source"] = self.calibration_sha256
        if content.get("decoder"):
            content["decoder"] |= {"text": self.text_sha256, "tokenizer": self.tokenizer_sha256}
        return sha256_data(content)

    @property
    def title(self) -> str:
        """The recipe's name; says ``-random`` where the weights are."""
        return self.recipe.name + ("-random" if self.random_weights else "")
