"""The manifest of a bundle: what is in it, how it was made, and what was proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.core.hashing import sha256_data
from edgeattn.core.specs import Ranges

SCHEMA_VERSION = 3


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorInfo(_Part):
    """An input or output of an entry; shape and dtype are the artifact's own.

    Attributes:
        layout: how its channels differ from the model's input of that name, see ``targets.base.Tensor``; else "".
        pixels: factor and offset of each channel where it takes raw pixels, see ``targets.base.Tensor``.
        dynamic: (axis, min, opt, max) of the dimensions that may vary, and their step if it is not 1; left out of the
            text where none does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""
    pixels: tuple[tuple[float, float], ...] = ()
    dynamic: Ranges = ()

    @model_serializer(mode="wrap")
    def _terse(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A manifest's digest is over its text, so bundles from before there were ranges must read back unchanged."""
        data: dict[str, Any] = plain(self)
        if not self.dynamic:
            del data["dynamic"]
        return data


class EntryInfo(_Part):
    """A runnable graph: its file in the bundle, inputs and outputs."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class FileInfo(_Part):
    """SHA-256 and size in bytes of one file."""

    sha256: str
    size: int


class StageInfo(_Part):
    """One stage of the pipeline: its cache key, how long it took and its own peak memory when it ran."""

    name: str
    key: str
    seconds: float
    peak_mb: float


class Weights(_Part):
    """Where the weights come from; random ones are called random."""

    kind: Literal["checkpoint", "random"]
    sha256: str | None = None
    seed: int


class RuntimeInfo(_Part):
    """A runtime with which the numbers were proven: distribution, version, and the machine's instruction set."""

    name: str
    version: str
    machine: str


class CacheRow(_Part):
    """One tensor of a decoder's cache: (1, context, width)."""

    name: str
    width: int


class DecoderInfo(_Part):
    """How tokens are made with a decoder's entries.

    Attributes:
        context: tokens that the cache holds. vocabulary: number of logits.
        stop: tokens that end a text. tokenizer: file in the bundle, "" where there is none.
        chat_template: Jinja, "" where there is none. special_tokens: what it may name, such as bos_token.
        borrowed: the tokenizer is not the checkpoint's own.
    """

    context: int
    vocabulary: int
    cache: tuple[CacheRow, ...]
    stop: tuple[int, ...] = ()
    tokenizer: str = ""
    chat_template: str = ""
    special_tokens: dict[str, str] = Field(default_factory=dict)
    borrowed: bool = False


class ArtifactInfo(_Part):
    """One artifact of a bundle: the program as one backend runs it, and what was proven of it.

    Attributes:
        backend: the target that lowered it, hence the kind of runtime that it needs.
        requirement: the pip requirement of ``run.py`` for it; "" if it cannot run without EdgeAttn.
        runtimes: with which the numbers were proven.
        unproven: what that leaves open, in a sentence; "" where the runtime is the device's own.
        numerics: what its numbers were held against, by golden sample and output.
        task: score on the held-out samples, for the reference and for the artifact.
        decoding: of a decoder, what a text showed: KL, top-1 agreement, perplexities, drift, greedy continuation.
        facts: what the target recorded: node counts, transposes, what stayed in float32 and why.
        lint: findings; none of them is an error, for an error ends the export.
    """

    backend: str
    requirement: str
    entries: dict[str, EntryInfo]
    runtimes: tuple[RuntimeInfo, ...]
    unproven: str = ""
    tools: dict[str, str | None]
    numerics: dict[str, Any]
    task: dict[str, Any] | None = None
    decoding: dict[str, Any] | None = None
    facts: dict[str, Any] = Field(default_factory=dict)
    lint: tuple[dict[str, Any], ...] = ()

    @model_serializer(mode="wrap")
    def _terse(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only decoders have: manifests of other models read back unchanged."""
        data: dict[str, Any] = plain(self)
        return {key: value for key, value in data.items() if key not in ("decoding", "decoder") or value is not None}


class Manifest(ArtifactInfo):
    """Everything that is known of a bundle; what it says of an artifact is said of the one in front.

    Attributes:
        target: what was asked for; differs from ``backend`` where a target stands for several.
        key: digest of all that went in: recipe, weights, code, tool versions, host architecture.
        files: every file of the bundle but this one.
        reparam: the reparameterization proof (``edgeattn.reparam.Proof.to_dict``).
        alternatives: further artifacts of the same program, in the order of preference.
        choice: why the one in front stands there, where there are several.
        decoder: how tokens are made, where the entries are a decoder's steps.
        digest: SHA-256 of all other fields, so that a change of the manifest itself is seen.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    target: str
    precision: str
    device: str | None
    created: str
    key: str
    weights: Weights
    recipe: dict[str, Any]
    recipe_sha256: str
    tolerance: float
    files: dict[str, FileInfo] = Field(default_factory=dict)
    host: dict[str, str]
    stages: tuple[StageInfo, ...]
    reparam: dict[str, Any]
    alternatives: tuple[ArtifactInfo, ...] = ()
    choice: dict[str, Any] | None = None
    decoder: DecoderInfo | None = None
    digest: str = ""

    @property
    def artifacts(self) -> tuple[ArtifactInfo, ...]:
        """All of them, the one in front first."""
        return (self, *self.alternatives)

    def sealed(self) -> Manifest:
        """A copy whose ``digest`` fits the other fields."""
        data = self.model_dump(mode="json")
        data.pop("digest")
        return self.model_copy(update={"digest": sha256_data(data)})

    def text(self) -> str:
        """The one text of this manifest; a file that differs from it in any byte was changed."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        UsageError: not there, or of a newer schema. CheckFailed: damaged, or changed after it was sealed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(
            "this is not a bundle", value=path.parent, why=f"manifest.json cannot be read ({error.strerror})"
        ) from error
    try:
        text = raw.decode("utf-8")
        data = json.loads(text)
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckFailed(
            "the manifest is damaged",
            where=str(path),
            why=f"not a manifest in JSON: {error}",
            fix="copy the bundle again",
        ) from error
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise UsageError(
            "the bundle was made by an older EdgeAttn",
            value=f"schema version {version}",
            where=str(path),
            why=f"this version reads {SCHEMA_VERSION}",
            fix="export anew",
        )
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(
            "the bundle was made by a newer EdgeAttn",
            value=f"schema version {version}",
            where=str(path),
            why=f"this version reads up to {SCHEMA_VERSION}",
            fix="pip install --upgrade edgeattn",
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(map(str, item["loc"]))
        raise CheckFailed(
            "the manifest is damaged", where=f"{path}, {key}", why=item["msg"], fix="copy the bundle again"
        ) from error
    try:
        whole = manifest.sealed().digest == manifest.digest and manifest.text() == text
    except ValueError:  # a number that is not finite, or half of a surrogate pair: never written
        whole = False
    if not whole:
        raise CheckFailed(
            "the manifest was changed after it was sealed",
            where=str(path),
            why="its digest does not fit its content",
            fix="copy the bundle again, or export anew",
        )
    return manifest
