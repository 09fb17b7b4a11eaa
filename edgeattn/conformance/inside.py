"""What a target promises of the inside of an artifact, and of what it knows before and after it was made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from edgeattn.conformance.kit import Kit, digest_of, places_of
from edgeattn.conformance.lowering import feeds_of
from edgeattn.conformance.models import PERCEPTRON_MACS, Case, cases
from edgeattn.conformance.result import NotHeld, demand
from edgeattn.core.errors import EdgeAttnError, UsageError
from edgeattn.core.numerics import compare
from edgeattn.lint import Finding
from edgeattn.targets.base import Artifact, OpCost, Step, TraceValue

_SEVERITIES = ("error", "warning", "note")


def _known(case: Case, module: str) -> bool:
    """Whether a module's path is one of the model's; "" is the model itself, or unknown."""
    return not module or case.modules is None or module in case.modules


def steps(kit: Kit) -> str:
    """``steps`` are in execution order, give the outputs, and name modules of the model."""
    count = 0
    for case, artifact in kit.taken():
        found = kit.target.open(artifact).steps(case.entry)
        made = {name for step in found for name in step.outputs}
        seen: set[str] = set()
        for step in found:
            demand(isinstance(step, Step) and bool(step.op), f"{case.name}: a Step with its op", step, "name its kind")
            early = [name for name in step.inputs if name in made and name not in seen]
            demand(not early, f"{case.name}: inputs of {step.op} made before it", early, "execution order")
            strange = [path for path in (step.module, *step.fused) if not _known(case, path)]
            demand(not strange, f"{case.name}: modules of the model", strange, 'a path of named_modules, or ""')
            seen |= set(step.outputs)
        if found:
            lacking = [tensor.name for tensor in artifact.entries[case.entry].outputs if tensor.name not in made]
            demand(not lacking, f"{case.name}: steps that give the outputs", f"none gives {lacking}", "list them all")
        count += len(found)
    return f"{count} operations" if count else "none: the runtime shows nothing of what is inside"


def trace(kit: Kit) -> str:
    """``trace`` gives float tensors, at last the outputs as ``run`` has them; of ``wanted`` ones those alone."""
    count, limit = 0, kit.target.tolerance(kit.precision)
    for case, artifact in kit.taken():
        runtime, fed = kit.target.open(artifact), feeds_of(case, artifact)
        results = runtime.run(case.entry, fed)
        last: dict[str, TraceValue] = {}
        for item in runtime.trace(case.entry, fed):
            fine = isinstance(item, TraceValue) and isinstance(item.value, np.ndarray)
            demand(fine, f"{case.name}: TraceValue with an array", item, "yield TraceValue(name, module, op, value)")
            demand(_known(case, item.module), f"{case.name}: a module of the model", item.module, 'a path, or ""')
            last[item.name] = item
            count += 1
        if not last:
            continue
        for name, value in results.items():
            if value.dtype.kind != "f":
                continue
            demand(name in last, f"{case.name}: output {name} in the trace", ", ".join(last)[:200], "yield it last")
            error = compare(value, last[name].value).relative_l2
            demand(error <= limit, f"{case.name}: {name} as run has it", f"{error:.3g} off", "trace the same graph")
        wanted = next(iter(last))
        named = {item.name for item in runtime.trace(case.entry, fed, {wanted})}
        demand(named == {wanted}, f"{case.name}: of the wanted {wanted} that alone", sorted(named), "look at wanted")
    return f"{count} tensors" if count else "none: the runtime shows nothing of what is inside"


def operations(kit: Kit) -> str:
    """``operations`` counts what is computed and moved; an unknown entry or a damaged file is a UsageError."""
    count = 0
    for case, artifact in kit.taken():
        found = kit.target.operations(artifact, case.entry)
        for cost in found:
            demand(isinstance(cost, OpCost), f"{case.name}: OpCost", type(cost), "return OpCost(...)")
            sizes = (cost.macs, cost.bytes_in, cost.bytes_weights, cost.bytes_out, cost.channels, cost.fan)
            demand(all(isinstance(n, int) and n >= 0 for n in sizes), f"{cost.name}: whole numbers", sizes, "count")
            demand(_known(case, cost.module), f"{cost.name}: a module of the model", cost.module, 'a path, or ""')
        if not found:
            continue
        demand(sum(cost.bytes for cost in found) > 0, f"{case.name}: bytes moved", 0, "count inputs and outputs")
        if case.name in ("perceptron", "rectified"):
            macs = sum(cost.macs for cost in found)
            demand(macs == PERCEPTRON_MACS, f"{case.name}: {PERCEPTRON_MACS} multiply-accumulates", macs, "count them")
        strange = set(kit.target.units(artifact, case.entry)) - {cost.name for cost in found}
        demand(not strange, f"{case.name}: units of operations", sorted(strange)[:5], "by the operations' names")
        _refuses(f"{case.name}: an unknown entry", lambda a=artifact: kit.target.operations(a, "no-such-entry"))
        damaged = _damaged(artifact, kit.folder / f"damaged-{case.name}")
        _refuses(f"{case.name}: a damaged file", lambda a=damaged, e=case.entry: kit.target.operations(a, e))
        count += len(found)
    return f"{count} operations" if count else "none: what is computed is not told"


def _refuses(words: str, call: object) -> None:
    """Raises NotHeld unless the call ends in a UsageError."""
    assert callable(call)
    try:
        answer = call()
    except UsageError:
        return
    except Exception as error:
        raise NotHeld(f"{words}: a UsageError", f"{type(error).__name__}: {error}", "raise UsageError") from error
    raise NotHeld(f"{words}: a UsageError", f"an answer: {str(answer)[:200]}", "raise UsageError")


def _damaged(artifact: Artifact, folder: Path) -> Artifact:
    """A copy whose files are cut off in the middle."""
    shutil.copytree(artifact.folder, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return Artifact(folder, artifact.precision, artifact.entries, artifact.facts)


def adopt(kit: Kit) -> str:
    """``adopt`` knows its own files by their look, leaves others, and says what is wrong with a damaged one."""
    case, artifact = kit.taken()[0]
    for name, text in (("notes.txt", "no artifact"), ("some.bin", "\x00\x01")):
        path = kit.folder / name
        path.write_text(text, encoding="utf-8")
        answer = kit.target.adopt(path)
        demand(answer is None, f"None for {name}", answer, "look at the suffix or the first bytes")
    file = artifact.entries[case.entry].file
    own = kit.target.adopt(artifact.folder / file)
    if own is None:
        return "it adopts no files"
    there = all((own.folder / entry.file).exists() for entry in own.entries.values())
    demand(there and bool(own.entries), f"the entries of {file}", own, "file names relative to the folder")
    kit.target.open(own)
    damaged = _damaged(artifact, kit.folder / "damaged-file").folder / file
    try:
        answer = kit.target.adopt(damaged)
    except EdgeAttnError:
        return f"{file}, and a damaged one refused"
    demand(answer is None, "a UsageError for a damaged file", answer, "raise UsageError")
    return file


def others(kit: Kit) -> str:
    """Further runtimes are there by name, and run what the target's own does."""
    case, artifact = kit.taken()[0]
    found = kit.target.others(artifact)
    for name, runtime in found.items():
        demand(isinstance(name, str) and hasattr(runtime, "run"), "runtimes by name", found, "{'name': runtime}")
        runtime.run(case.entry, feeds_of(case, artifact))
    return ", ".join(found) or "none"


def lint(kit: Kit) -> str:
    """``lint`` looks at any program for any device, never raises, and names modules of the model."""
    kit.need_alone()
    places = [None, *places_of(kit.target)]
    count = 0
    for case in cases(kit.target):
        before = digest_of(case)
        for place in places:
            for finding in kit.target.lint(case.program, place):
                demand(isinstance(finding, Finding), f"{case.name}: Finding", type(finding), "RuleBook.finding")
                words = f"a severity out of {', '.join(_SEVERITIES)}"
                demand(finding.severity in _SEVERITIES, words, finding.severity, "choose one")
                demand(_known(case, finding.module), "a module of the model", finding.module, 'a path, or ""')
                demand(bool(finding.mend), f"what to do about {finding.rule}", repr(finding.mend), "say it")
                count += 1
        demand(digest_of(case) == before, f"{case.name} as it was", "another graph", "look, and change nothing")
    return f"{count} findings, for {len(places) - 1} devices and for none"
