"""The stages of an export: what each depends on. Their code is in the modules beside, imported by the worker only.

recipe -> build -> reference
               \\-> reparameterize -> capture -> lint -> (quantize) -> lower -> verify -> bundle
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgeattn
from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core import tools
from edgeattn.core.hashing import sha256_file
from edgeattn.lint.books import user_books
from edgeattn.pipeline.job import Job, takes_pixels

PACKAGE = Path(edgeattn.__file__).parent


@dataclass(frozen=True)
class Stage:
    """One step from values to a new value.

    Attributes:
        needs: stages whose results go in.
        code: files and folders of the package whose bytes are the stage's code version.
        tools: distributions whose versions can change the result.
        config: the part of the job that can change the result, as plain data.
        applies: whether a job has this stage at all.
    """

    name: str
    needs: tuple[str, ...]
    code: Callable[[Job], tuple[str, ...]]
    tools: Callable[[Job], tuple[str, ...]]
    config: Callable[[Job], dict[str, Any]]
    applies: Callable[[Job], bool] = lambda job: True


def _build_config(job: Job) -> dict[str, Any]:
    recipe = job.resolved.recipe.model_dump(mode="json")
    return {
        "factory": recipe["model"]["factory"],
        "args": recipe["model"]["args"],
        "checkpoint": job.resolved.checkpoint_sha256,
        # Ranges do not count: the model is built for the shape alone, once for all targets.
        "inputs": {name: {k: v for k, v in spec.items() if k != "dynamic"} for name, spec in recipe["inputs"].items()},
        "seed": recipe["seed"],
    }


def _reference_config(job: Job) -> dict[str, Any]:
    resolved, recipe = job.resolved, job.resolved.recipe.model_dump(mode="json")
    heldout = job.resolved.heldout_sha256
    return {
        "outputs": recipe["outputs"],
        "preprocess": recipe["preprocess"] if heldout or takes_pixels(job) else None,
        "pixels": takes_pixels(job),
        "heldout": heldout,
        "golden": recipe["heldout"]["golden"] if heldout else None,
        "dynamic": job.dynamic,
        **(
            {"decoder": recipe["decoder"], "text": resolved.text_sha256, "tokenizer": resolved.tokenizer_sha256}
            if recipe.get("decoder")
            else {}
        ),
    }


def _steps(job: Job) -> dict[str, Any]:
    """A decoder's entries; nothing for other models."""
    return {"steps": [vars(step) for step in job.steps]} if job.steps else {}


def _lint_config(job: Job) -> dict[str, Any]:
    """Of the device what findings depend on, so that one artifact serves all that are alike in it."""
    place, target = devices.resolve(job.device) if job.device else None, targets.get(job.target)
    fixed = {} if job.dynamic else job.ranges
    books, code = user_books(), targets.code_of(job.target)
    targets.check_rules(books)
    return {
        "target": job.target,
        "runtime": job.runtime,
        "chip": place.chip if place else None,
        "optics": [place.optics.rows, place.optics.cols] if place and place.optics else None,
        "fixed": fixed,
        # The converters are asked what they know, and rules hold for versions of them.
        "tools": tools.versions(target.lower_tools(target.precisions(None)[0])),
        # A user's rules; loaded here, so that a mistake in one is said before anything runs.
        "rules": [[book.path.name, sha256_file(book.path)] for book in books],
        "versions": tools.versions(
            tuple(sorted({n for b in books for rule in b.rules.values() for n in rule.versions}))
        ),
        # A third party's code, which may look at anything of the device.
        **({"target code": code, "device": place and place.model_dump(mode="json")} if code else {}),
    }


def _quantize_config(job: Job) -> dict[str, Any]:
    """Of the target only whether biases can be corrected for it, so that one result serves all that are alike."""
    resolved, quant = job.resolved, job.quant
    return {
        "precision": job.precision,
        "quant": resolved.recipe.quant.model_dump(mode="json", exclude={"keep"}),
        "keep": [k.model_dump(mode="json") for k in quant.keep],
        "corrects": targets.get(job.target).rounds_as_planned,
        "calibration": resolved.recipe.calibration and resolved.recipe.calibration.model_dump(mode="json"),
        "source": resolved.calibration_sha256 or resolved.calibration,
        "preprocess": resolved.recipe.preprocess and resolved.recipe.preprocess.model_dump(mode="json"),
    }


def _reparameterize_config(job: Job) -> dict[str, Any]:
    leaves = targets.get(job.target).leaves
    return {"leaves": leaves} if leaves else {}


def _lower_config(job: Job) -> dict[str, Any]:
    of_device = targets.get(job.target).of_device(devices.resolve(job.device) if job.device else None)
    return {
        "target": job.target,
        "precision": job.precision,
        "recipe": job.resolved.sha256,
        "runtime": job.runtime,
        "layout": job.layout,
        "options": job.settled,
        "strict": job.strict,
        **({"device": of_device} if of_device else {}),
        **({"code": code} if (code := targets.code_of(job.target)) else {}),
    }


def _bundle_config(job: Job) -> dict[str, Any]:
    return {"recipe": job.resolved.sha256, "device": job.device, "title": job.title}


def _target_code(job: Job) -> tuple[str, ...]:
    """A target's own folder; what a third party's holds is part of the configuration, see ``targets.code_of``."""
    return ("targets/base.py", "targets/feeds.py", *OWN_TARGETS.get(job.target, ()))


def _decoding_code(job: Job) -> tuple[str, ...]:
    return ("pipeline/decoding", "bundle/decoding.py", "bundle/runner_generate.py") if job.steps else ()


def _quant_code(job: Job) -> tuple[str, ...]:
    return ("quant",) if job.quant.quantizes else ()


def _lint_code(job: Job) -> tuple[str, ...]:
    """Of a target's folder only the rules, and the mends that make some of them void."""
    rules = [f"targets/{job.target}/{name}" for name in ("lint.py", "lint.toml", "mends")]
    rules += ["targets/onnx_graph/lint.py"] if job.target in ("onnx", "tensorrt") else []
    return ("targets/base.py", *(rule for rule in rules if (PACKAGE / rule).exists()))


#: Where the code of the targets is that are in this package.
OWN_TARGETS = {
    "coreml": ("targets/coreml",),
    "gguf": ("targets/gguf",),
    "onnx": ("targets/onnx", "targets/onnx_graph"),
    "optical": ("targets/optical", "targets/onnx_graph", "device.py"),
    "tensorrt": ("targets/tensorrt", "targets/onnx_graph"),
    "tflite": ("targets/tflite",),
    "null": ("targets/null",),
}

STAGES = (
    Stage(
        "build",
        (),
        lambda job: ("core", "models/build.py", "models/checkpoint.py", "models/init.py", "pipeline/stages/build.py"),
        lambda job: ("torch", "numpy", "safetensors"),
        _build_config,
    ),
    Stage(
        "reference",
        ("build",),
        lambda job: ("core", "pipeline/stages/reference.py", *_decoding_code(job)),
        lambda job: ("torch", "numpy"),
        _reference_config,
    ),
    Stage(
        "reparameterize",
        ("build", "reference"),
        lambda job: ("core", "reparam", "pipeline/stages/reparameterize.py"),
        lambda job: ("torch",),
        _reparameterize_config,
    ),
    Stage(
        "capture",
        ("reparameterize", "reference"),
        lambda job: ("core", "capture", "pipeline/stages/capture.py"),
        lambda job: ("torch",),
        lambda job: {"dynamic": job.dynamic, **_steps(job)},
    ),
    Stage(
        "lint",
        ("capture",),
        lambda job: ("core", "lint", "pipeline/stages/lint.py", *_lint_code(job)),
        lambda job: ("torch",),
        _lint_config,
    ),
    Stage(
        "quantize",
        ("capture", "reparameterize", "reference", "lint"),
        lambda job: ("core", "quant", "pipeline/stages/quantize.py"),
        lambda job: ("torch", "numpy"),
        _quantize_config,
        lambda job: job.quant.quantizes,
    ),
    Stage(
        "lower",
        ("capture", "reference", "lint", "quantize"),
        lambda job: ("core", "pipeline/stages/lower.py", *_quant_code(job), *_target_code(job)),
        lambda job: targets.get(job.target).lower_tools(job.precision),
        _lower_config,
    ),
    Stage(
        "verify",
        ("lower", "reference"),
        lambda job: (
            "core",
            "pipeline/stages/verify.py",
            "pipeline/diverge.py",
            *_decoding_code(job),
            *_quant_code(job),
            *_target_code(job),
        ),
        lambda job: targets.get(job.target).runtime_tools,
        lambda job: job.bounds,
    ),
    Stage(
        "bundle",
        ("verify", "lower", "lint", "reference", "reparameterize", "quantize"),
        lambda job: ("core", "bundle", "pipeline/export.py"),
        lambda job: ("edgeattn",),
        _bundle_config,
    ),
)
