"""What a target promises of an artifact: its files, its bytes, and its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from edgeattn.conformance.kit import Kit, Lowered, files_of
from edgeattn.conformance.models import Case, cases
from edgeattn.conformance.promises import environment
from edgeattn.conformance.result import NotHeld, Skipped, demand
from edgeattn.core.errors import UsageError
from edgeattn.core.files import inside
from edgeattn.core.hashing import canonical_json
from edgeattn.core.numerics import Array, compare
from edgeattn.targets.base import Artifact
from edgeattn.targets.feeds import own_feeds

#: The models that are lowered in a target's further precisions.
_IN_ALL = ("perceptron", "convolution", "rectified")


def feeds_of(case: Case, artifact: Artifact, sample: int = 0) -> dict[str, Array]:
    """A sample as the artifact takes it; a decoder whose cache is a state takes less."""
    inputs = artifact.entries[case.entry].inputs
    given = own_feeds(inputs, case.samples[sample])
    names = {spec.name for spec in inputs}
    return {name: value for name, value in given.items() if case.program.decoder is None or name in names}


def _words(one: Lowered) -> str:
    return f"{one.case.name} in {one.precision}"


def lower(kit: Kit) -> str:
    """Every model is lowered, or refused with a ConversionFailed that says which part of it stands in the way."""
    found = kit.all()
    for one in found:
        error = one.error
        demand(
            error is None,
            f"{_words(one)} lowered, or ConversionFailed",
            f"{type(error).__name__}: {error}",
            "look at the program before anything is written, and raise ConversionFailed with all that is in the way",
        )
        if one.refused is None:
            demand(isinstance(one.artifact, Artifact), "an Artifact", type(one.artifact), "return it")
            continue
        text, graph = str(one.refused), one.case.program.entries[one.case.entry].graph.graph
        stacks = [list((node.meta.get("nn_module_stack") or {}).values()) for node in graph.nodes]
        paths = {str(path) for stack in stacks for path, *_ in stack if path}
        demand(
            any(path in text for path in (*paths, "(model)", *one.case.program.entries)),
            f"{_words(one)} refused with the module in the way",
            text,
            "ConversionFailed(..., where=f'module {path}', details=[one line for each operation])",
        )
    taken = [one.case.name for one in found if one.artifact]
    refused = [one.case.name for one in found if one.refused]
    if not taken:
        raise Skipped(f"it refused {', '.join(refused)}, each with its reason; 'export' has to find a model for it")
    return f"took {', '.join(taken)}" + (f"; refused {', '.join(refused)}, with the reason" if refused else "")


def files(kit: Kit) -> str:
    """``lower`` writes into its folder alone, and the artifact's files are there."""
    count = 0
    for one in kit.all():
        mend = "write below out; tempfile for what is only for a while"
        demand(not one.strays, f"{_words(one)}: nothing written outside", ", ".join(one.strays[:5]), mend)
        if one.refused:
            left = files_of(kit.folder / f"{one.case.name}-{one.precision}-0" / "around" / "out")
            demand(not left, f"{_words(one)}: nothing left by a refusal", sorted(left), "refuse before writing")
        if not isinstance(one.artifact, Artifact):
            continue
        artifact = one.artifact
        for name, entry in artifact.entries.items():
            there = inside(artifact.folder, entry.file).exists()
            demand(there, f"{_words(one)}: the file of entry {name}", entry.file, "relative to the artifact's folder")
        canonical_json(dict(artifact.facts))
        demand(artifact.precision == one.precision, f"precision {one.precision}", artifact.precision, "plan.precision")
        count += len(files_of(artifact.folder))
    if not count:
        raise Skipped("no model was lowered")
    return f"{count} files"


def program(kit: Kit) -> str:
    """``lower`` leaves the program as it was: other stages and targets use it too."""
    found = kit.all()
    changed = [_words(one) for one in found if one.changed]
    demand(not changed, "graphs and weights as they were", f"others of {', '.join(changed)}", "copy.deepcopy first")
    return f"{len(found)} programs"


def same_bytes(kit: Kit) -> str:
    """A program that is lowered twice gives the same bytes."""
    count = 0
    for case, first in kit.taken():
        second = kit.lowered(case, kit.precision, again=1).artifact
        demand(isinstance(second, Artifact), f"{case.name} lowered again", second, "keep nothing between calls")
        assert second is not None
        count += _same(kit, case.name, files_of(first.folder), files_of(second.folder))
    return f"{count} files"


def _same(kit: Kit, name: str, first: Mapping[str, str], second: Mapping[str, str]) -> int:
    """How many files; raises NotHeld where some differ that a vendor's builder does not account for."""
    demand(set(first) == set(second), f"{name}: the same files", sorted(second), "name them by the entry")
    other = [file for file in first if first[file] != second[file]]
    other = [file for file in other if not any(fnmatchcase(file, pattern) for pattern in kit.target.varies)]
    mend = "no time, path, random identifier or order of a set may go into a file: caches and lock files go by bytes"
    demand(not other, f"{name}: the same bytes", f"others in {', '.join(other)}", mend)
    return len(first)


#: Lowers a model again in a process of its own, and runs what the first process wrote.
_CHILD = """
import importlib, json, sys
from pathlib import Path
import numpy as np
from edgeattn.conformance.kit import Kit, files_of
from edgeattn.conformance.lowering import feeds_of
from edgeattn.conformance.models import cases
from edgeattn.core.files import remove
asked = json.loads(sys.argv[1])
module, _, name = asked["place"].partition(":")
target = getattr(importlib.import_module(module), name)()
folder = Path(asked["folder"])
kit = Kit(target, "", asked["place"], folder)
case = next(case for case in cases(target) if case.name == asked["case"])
mine = kit.lowered(case, asked["precision"]).artifact
from edgeattn.conformance.child import described
other = described(asked["artifact"])
outputs = target.open(other).run(case.entry, feeds_of(case, other))
np.savez(folder / "outputs.npz", **{f"out.{name}": value for name, value in outputs.items()})
print(json.dumps(files_of(mine.folder)))
"""


def other_process(kit: Kit) -> str:
    """Another process with another hash seed writes the same bytes, and runs what this one wrote."""
    from edgeattn.conformance.child import describe

    case, artifact = kit.taken()[0]
    folder = kit.folder / "other-process"
    folder.mkdir()
    asked = {
        "place": kit.place,
        "folder": str(folder),
        "case": case.name,
        "precision": kit.precision,
        "artifact": describe(artifact),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(asked)],
        env={**environment(), "PYTHONHASHSEED": "20261"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    tail = "\n".join(done.stderr.strip().splitlines()[-3:])
    demand(done.returncode == 0, f"{case.name} lowered, opened and run", tail, "keep nothing outside of the artifact")
    ours = kit.target.open(artifact).run(case.entry, feeds_of(case, artifact))
    with np.load(folder / "outputs.npz", allow_pickle=False) as data:
        theirs = {key[4:]: data[key] for key in data.files}
    equal = set(ours) == set(theirs) and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    demand(equal, f"{case.name}: the same numbers there", "others", "keep nothing outside of the artifact")
    count = _same(kit, case.name, files_of(artifact.folder), json.loads(done.stdout.splitlines()[-1]))
    return f"{case.name}: {count} files, {len(ours)} outputs"


def outputs(kit: Kit) -> str:
    """Entries, inputs and outputs have the program's names, and ``run`` gives what the artifact says."""
    count = 0
    for case, artifact in kit.taken():
        names = list(case.program.entries)
        demand(set(artifact.entries) == set(names), f"{case.name}: entries {names}", list(artifact.entries), "as given")
        spec, entry = artifact.entries[case.entry], case.program.entries[case.entry]
        # A cache may be a state of the artifact's own, and its rows no inputs and outputs.
        kept = set() if case.program.decoder is None else {name for name, _ in case.program.decoder.rows}
        kept |= {name for name in entry.outputs if name.startswith("new_") and kept}
        for what, said, wanted in (("inputs", spec.inputs, entry.inputs), ("outputs", spec.outputs, entry.outputs)):
            given = [tensor.name for tensor in said]
            asked = [name for name in wanted if name not in kept or name in given]
            demand(
                set(given) == set(asked),
                f"{case.name}: {what} {', '.join(asked)}",
                ", ".join(given),
                "the artifact's own names may differ inside; what it says and takes are the recipe's",
            )
        results = kit.target.open(artifact).run(case.entry, feeds_of(case, artifact))
        said_names = [tensor.name for tensor in spec.outputs]
        demand(set(results) == set(said_names), f"{case.name}: run gives {said_names}", list(results), "by name")
        for tensor in spec.outputs:
            value, reference = results[tensor.name], case.references[0][tensor.name]
            demand(isinstance(value, np.ndarray), f"{tensor.name} as a NumPy array", type(value), "convert it")
            words = f"{case.name}: {tensor.name} {reference.shape}, {tensor.dtype}"
            fits = value.shape == reference.shape and tensor.takes(value.shape) and str(value.dtype) == tensor.dtype
            kinds = value.dtype.kind == reference.dtype.kind
            demand(fits and kinds, words, f"{value.shape} {value.dtype}", "say what run gives, and give what was said")
            count += 1
    return f"{count} outputs"


def numbers(kit: Kit) -> str:
    """Outputs are as near to PyTorch's float32 as the precision promises."""
    worst, count = 0.0, 0
    for case, artifact in kit.taken():
        error, outputs = _distance(kit, case, artifact, kit.precision)
        worst, count = max(worst, error), count + outputs
    if not count:
        raise Skipped("no output has the name that it should have")
    return f"{count} outputs of two samples each, relative L2 {worst:.1e} at most"


def _distance(kit: Kit, case: Case, artifact: Artifact, precision: str) -> tuple[float, int]:
    """Largest relative L2 over two samples, and how many outputs; raises NotHeld where it is above the tolerance."""
    runtime, limit, worst, count = kit.target.open(artifact), kit.target.tolerance(precision), 0.0, 0
    # An artifact that keeps the cache itself begins with an empty one.
    states = len(artifact.entries[case.entry].inputs) < len(case.program.entries[case.entry].inputs)
    for sample, reference in enumerate(case.references[: 0 if states else 2]):
        results = runtime.run(case.entry, feeds_of(case, artifact, sample))
        for name, value in results.items():
            if name not in reference or value.shape != reference[name].shape:
                continue  # of 'outputs'
            found, count = compare(reference[name], value), count + 1
            demand(
                found.holds(limit),
                f"{case.name}: {name} within a relative L2 of {limit:g} in {precision}",
                f"{found.relative_l2:.3g}, {found.nonfinite} not finite",
                "compare operation by operation with 'edgeattn debug'",
            )
            worst = max(worst, found.relative_l2)
    return worst, count


def other_precisions(kit: Kit) -> str:
    """Every further precision takes a model, and holds its numbers."""
    kit.need_alone()
    plain = {case.name: case for case in cases(kit.target)}
    said = []
    for precision in kit.target.precisions(None)[1:]:
        found = [kit.lowered(plain[name], precision) for name in _IN_ALL]
        failed = [one for one in found if one.error]
        demand(
            not failed,
            f"{precision}: models lowered, or ConversionFailed",
            f"{_words(failed[0])}: {type(failed[0].error).__name__}: {failed[0].error}" if failed else "",
            "see the check 'lower'",
        )
        worst = [_distance(kit, one.case, one.artifact, precision)[0] for one in found if one.artifact]
        if not worst and kit.target.cache:
            one = kit.lowered(plain["decoder"], precision)
            worst = [_distance(kit, one.case, one.artifact, precision)[0]] if one.artifact else []
        demand(bool(worst), f"a model in {precision}", "all were refused", "take it out of precisions()")
        said.append(f"{precision} {max(worst):.1e}")
    if not said:
        raise Skipped(f"it has {kit.precision} alone")
    return f"relative L2 at most: {', '.join(said)}"


def runs(kit: Kit) -> str:
    """``run`` leaves its feeds alone, keeps no state, and does not write into results that it gave before."""
    count = 0
    for case, artifact in kit.taken():
        if len(artifact.entries[case.entry].inputs) < len(case.program.entries[case.entry].inputs):
            continue  # its cache is a state
        runtime = kit.target.open(artifact)
        feeds, others = feeds_of(case, artifact), feeds_of(case, artifact, 1)
        copies = {name: value.copy() for name, value in feeds.items()}
        first = runtime.run(case.entry, feeds)
        kept = {name: np.array(value) for name, value in first.items()}
        runtime.run(case.entry, others)
        same = all(np.array_equal(feeds[name], copies[name]) for name in copies)
        demand(same, f"{case.name}: feeds as they were", "others", "copy what is worked on")
        alone = all(np.array_equal(first[name], kept[name]) for name in kept)
        mend = "copy results out of the runtime's buffers"
        demand(alone, f"{case.name}: the first results as they were after the second run", "others", mend)
        again = runtime.run(case.entry, feeds)
        equal = all(np.array_equal(again[name], kept[name]) for name in kept)
        demand(equal, f"{case.name}: the same results for the same feeds", "others", "keep no state between runs")
        count += 1
    if not count:
        raise Skipped("every model keeps a state")
    return f"{count} models, three runs each"


def feeds(kit: Kit) -> str:
    """``run`` refuses feeds of other names, shapes or types, and an unknown entry, with a UsageError."""
    count = 0
    for case, artifact in kit.taken():
        runtime, given = kit.target.open(artifact), feeds_of(case, artifact)
        name, value = next(iter(given.items()))
        wrong: dict[str, tuple[str, dict[str, Array]]] = {
            "an unknown entry": ("no-such-entry", given),
            f"without {name}": (case.entry, {key: v for key, v in given.items() if key != name}),
            "one input too many": (case.entry, {**given, "no.such.input": value}),
            f"{name} with an axis more": (case.entry, {**given, name: value[None]}),
            f"{name} as complex numbers": (case.entry, {**given, name: value.astype(np.complex64)}),
        }
        for words, (entry, fed) in wrong.items():
            count += 1
            try:
                answer = runtime.run(entry, fed)
            except UsageError:
                continue
            except Exception as error:
                raise NotHeld(
                    f"{case.name}, {words}: a UsageError",
                    f"{type(error).__name__}: {error}",
                    "edgeattn.targets.feeds.check_feeds and base.entry_of do it",
                ) from error
            demand(
                False,
                f"{case.name}, {words}: a UsageError",
                f"an answer with {', '.join(answer)}",
                "edgeattn.targets.feeds.check_feeds and base.entry_of do it",
            )
    return f"{count} calls"
