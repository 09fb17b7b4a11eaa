"""Lint: what is known to go wrong or slow on the target. Errors among it end the export at its next stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core.specs import shape_texts
from edgeattn.lint import Finding
from edgeattn.lint.books import own, shared, user_books
from edgeattn.lint.engine import all_of
from edgeattn.lint.fix import Fix, fix
from edgeattn.lint.source import Sources, located
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages import PACKAGE, lower


def _fixed(job: Job) -> list[Finding]:
    """A note where the recipe lets dimensions vary and the target does not."""
    specs = [spec for spec in job.resolved.recipe.specs() if spec.dynamic]
    if not specs or targets.get(job.target).dynamic:
        return []
    texts = [
        f"{s.name}: {'x'.join(shape_texts(s.shape, s.dynamic))} became {'x'.join(map(str, s.shape))}" for s in specs
    ]
    return [
        Finding(
            "fixed-shape",
            "note",
            "",
            f"target {job.target} takes one shape; the artifact was made for the recipe's own",
            "; ".join(texts),
            "export once for each shape that is needed, or take a target with dynamic shapes",
        )
    ]


def _sources(job: Job) -> Sources:
    return Sources(job.resolved.recipe.model.factory, Path(job.resolved.folder))


def run(context: Context) -> dict[str, Any]:
    """Fact: the findings."""
    job = context.job
    device = devices.resolve(job.device) if job.device else None
    program = context.value("capture")
    findings = [*_fixed(job), *targets.get(job.target).lint(program, device)]
    findings += all_of(program, [shared(), *user_books()], job.target)
    return {"findings": [finding.as_dict() for finding in located(findings, program, _sources(job))]}


def by_files(context: Context, files: Sequence[Path]) -> list[Finding]:
    """Findings of rules that only this command line has, after a run.

    Raises:
        UsageError: a file is not valid.
    """
    program, known = context.value("capture"), len(user_books())
    found = all_of(program, user_books(files)[known:], context.job.target)
    return located(found, program, _sources(context.job))


def fixes(context: Context, findings: Sequence[Finding]) -> list[Fix]:
    """What the safe mends of the rules that were met do to the captured program, each by itself, after a run."""
    target = context.job.target
    folder = PACKAGE / "targets" / target
    rules = dict(shared().of(target))
    if (folder / "lint.toml").is_file():
        rules |= own(folder, target).of(target)
    names = {f.rule: rules[f.rule].fix for f in findings if f.rule in rules and rules[f.rule].fix}
    if not names:
        return []
    program = context.value("capture")
    samples: dict[str, Sequence[Any]] = dict(lower._step_samples(context))
    samples = samples or {"main": [feeds for feeds, _ in context.golden()]}
    tried = [fix(program, rule, name, target, samples) for rule, name in names.items()]
    return [done for done in tried if done is not None]
