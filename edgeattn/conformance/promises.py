"""What a target promises before it lowers anything: names, types, options, and that looking at it costs nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from edgeattn import targets
from edgeattn.bundle import runner
from edgeattn.conformance.kit import Kit, places_of
from edgeattn.conformance.result import Skipped, demand
from edgeattn.core import tools
from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import TOLERANCES
from edgeattn.targets.base import NCHW, NHWC, Availability, Target

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FLAGS = ("keeps_wider", "rounds_as_planned", "asymmetric", "half_activations", "dynamic")
_CACHES = ("", "dynamic", "buckets", "whole")
#: What takes long to import, or may not be there.
HEAVY = (
    *("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorflow", "jax", "coremltools"),
    *("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "tensorrt", "tensorrt_rtx", "gguf", "llama_cpp", "tvm"),
    *("openvino", "executorch", "transformers", "scipy", "sklearn", "pandas", "matplotlib"),
)

#: Looks at a target as ``edgeattn targets`` and ``doctor`` do, once as things are and once with nothing installed.
_PROBE = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
target = getattr(importlib.import_module(module), name)()
from edgeattn.core import tools
said = []
for looked in (tools.version, lambda name: None):
    tools.version = looked
    try:
        found = target.availability()
        said.append([type(found).__name__, bool(found.found), str(found.detail), found.fix])
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
target.precisions(None)
print(json.dumps([said, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def environment() -> dict[str, str]:
    """For a process that finds the same modules as this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def _probe(kit: Kit) -> tuple[list[Any], list[str]]:
    """What ``availability`` said in a fresh process, as things are and without any package; loaded modules."""
    if kit.probed is not None:
        return kit.probed
    command = [sys.executable, "-c", _PROBE, kit.place]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    tail = done.stderr.strip().splitlines()[-1:] or [""]
    demand(done.returncode == 0, "a module that can be imported", tail[0], f"python -c 'import {kit.place}'")
    said, modules = json.loads(done.stdout.splitlines()[-1])
    kit.probed = said, modules
    return said, modules


def names(kit: Kit) -> str:
    """A subclass of ``Target`` whose name is its entry point's."""
    target = kit.target
    demand(isinstance(target, Target), "a subclass of Target", type(target), "class Mine(edgeattn.targets.base.Target)")
    demand(
        isinstance(target.name, str) and _NAME.fullmatch(target.name) is not None,
        "a name of small letters, digits, - and _: it becomes part of file names",
        repr(target.name),
        "name: ClassVar[str] = 'mine'",
    )
    if kit.name:
        demand(target.name == kit.name, f"name = {kit.name!r}, as its entry point", repr(target.name), "make them one")
        demand(
            f"{type(target).__module__}:{type(target).__qualname__}" == kit.place or ":" in kit.place,
            "an entry point that names the class",
            kit.place,
            'mine = "package.module:Class"',
        )
    return f"{target.name} = {kit.place}"


def _strings(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


def attributes(kit: Kit) -> str:
    """Class attributes have the types and words of ``Target``."""
    target = kit.target
    for attribute in ("runtime_tools", "device_runtimes", "parts", "layouts", "leaves", "varies"):
        given = getattr(target, attribute, None)
        demand(_strings(given), f"{attribute}: a tuple of texts", repr(given), f"{attribute} = ('...',)")
    alone = not target.parts
    demand(
        bool(target.runtime_tools) == alone,
        "runtime_tools: what decides the numbers, the runtime itself first" if alone else "no runtime_tools of its own",
        target.runtime_tools,
        "runtime_tools = ('the-runtime', 'numpy')",
    )
    unknown = [part for part in target.parts if part not in targets.names()]
    demand(not unknown, "parts that are targets", unknown, f"known are {', '.join(targets.names())}")
    demand(
        bool(target.layouts) and set(target.layouts) <= {NCHW, NHWC},
        f"layouts out of {NCHW} and {NHWC}",
        target.layouts,
        f"layouts = ({NCHW!r},)",
    )
    options = target.options
    fine = isinstance(options, Mapping) and all(isinstance(k, str) and _strings(v) and v for k, v in options.items())
    demand(fine, "options: choices by name, the default first", repr(options), "options = {'name': ('default',)}")
    limits = target.tolerances
    fine = isinstance(limits, Mapping) and all(k in TOLERANCES and 0 < v < 1 for k, v in limits.items())
    demand(fine, f"tolerances above 0 and below 1, by {', '.join(TOLERANCES)}", repr(limits), "leave it away")
    for attribute in _FLAGS:
        given = getattr(target, attribute)
        demand(isinstance(given, bool), f"{attribute}: True or False", repr(given), "leave it away if it is False")
    demand(target.cache in _CACHES, f"cache out of {_CACHES}", repr(target.cache), 'cache = ""')
    demand(isinstance(target.unproven, str), "unproven: a sentence", repr(target.unproven), 'unproven = ""')
    return "types and words"


def imports(kit: Kit) -> str:
    """Importing the target, asking what it holds and whether it is there imports nothing heavy."""
    _, modules = _probe(kit)
    heavy = [name for name in HEAVY if name in modules]
    demand(not heavy, "no heavy module", ", ".join(heavy), "import it inside lower and open: --help has to stay fast")
    return f"a fresh process, {len(modules)} modules, none heavy"


def availability(kit: Kit) -> str:
    """``availability`` never raises, and says how to get what is missing."""
    said, _ = _probe(kit)
    for words, answer in zip(("as things are", "with no package installed"), said, strict=True):
        demand(not isinstance(answer, str), f"an answer ({words})", answer, "catch it, and say it in the detail")
        kind, found, detail, fix = answer
        demand(kind == Availability.__name__, "an Availability", kind, "return Availability(found, detail, fix)")
        demand(bool(detail), f"a detail ({words}): versions, or why it is off", repr(detail), "say it")
        demand(found or bool(fix), f"a fix where it is off ({words})", repr(fix), "fix = 'pip install ...'")
    return str(said[0][2])


def precisions(kit: Kit) -> str:
    """Known precisions, at least one, and on no device more than anywhere."""
    held = kit.target.precisions(None)
    demand(_strings(held) and bool(held), "a tuple of precisions", repr(held), "return ('fp32',)")
    unknown = [word for word in held if word not in TOLERANCES]
    demand(not unknown, f"words out of {', '.join(TOLERANCES)}", unknown, "call them so")
    demand(len(set(held)) == len(held), "each of them once", held, "take the others away")
    places = places_of(kit.target)
    for place in places:
        more = [word for word in kit.target.precisions(place) if word not in held]
        demand(not more, f"no more on {place.name} than anywhere", more, "list them for device None too")
    for word in held:
        limit = kit.target.tolerance(word)
        demand(0 < limit < 1, f"a tolerance of {word} above 0 and below 1", limit, "leave tolerance() as it is")
    return f"{', '.join(held)}; asked for {len(places)} devices"


def options(kit: Kit) -> str:
    """``settle`` gives every option a choice, and refuses what there is none of with a UsageError."""
    target, asked = kit.target, 0
    settled = target.settle({}, None)
    demand(set(settled) == set(target.options), "all options settled", sorted(settled), "call super().settle")
    for name, choices in target.options.items():
        for choice in choices:
            try:
                settled = target.settle({name: choice}, None)
            except UsageError:
                continue  # one that the device or precision cannot do with
            demand(set(settled) == set(target.options), "all options settled", sorted(settled), "call super().settle")
            asked += 1
    wrong = [{"no-such-option": "yes"}, *({name: "no-such-choice"} for name in target.options)]
    for given in wrong:
        try:
            answer = target.settle(given, None)
        except UsageError:
            continue
        demand(False, f"a UsageError for {given}", answer, "call super().settle")
    return f"{asked} choices, {len(wrong)} that there is none of"


def packages(kit: Kit) -> str:
    """Tools are installed distributions, by the names that pip has for them."""
    target = kit.target
    found = kit.availability is not None and kit.availability.found
    named: dict[str, None] = dict.fromkeys(target.runtime_tools)
    for precision in target.precisions(None):
        given = target.lower_tools(precision)
        demand(_strings(given) and bool(given), f"lower_tools({precision!r}): names", repr(given), "name what lowers")
        # One that only an option needs may be absent.
        absent = found and all(tools.version(name) is None for name in given)
        demand(not absent, "names of installed distributions", ", ".join(given), "pip list shows their names")
        named |= dict.fromkeys(given)
    if not found:
        raise Skipped("the toolchain is not here: whether pip knows them cannot be seen")
    first = target.runtime_tools[:1]
    missing = [name for name in first if tools.version(name) is None]
    demand(not missing, "the runtime as an installed distribution", missing, "pip list shows its name")
    return ", ".join(named)


def requirement(kit: Kit) -> str:
    """``package`` names what ``run.py`` needs, "" where it cannot run the artifact."""
    needs = kit.target.package()
    demand(isinstance(needs, str), "a text", repr(needs), 'return ""')
    known = {*runner.MODULES, *runner.PARTS}
    demand(
        not needs or kit.target.name in known,
        '"": a bundle\'s run.py has no code for this target',
        repr(needs),
        f'return ""; edgeattn verify runs it. run.py knows {", ".join(sorted(known))}',
    )
    return needs or "none: a bundle is run with EdgeAttn"
