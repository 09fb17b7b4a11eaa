"""Which operators, and which versions of them, a TFLite runtime knows; measured by offering it each one.

    python examples/tflite_operator_versions.py PYTHON [MODULE]

PYTHON is the interpreter of the environment with the runtime, MODULE what it is imported as (``tflite_runtime``, the
default, or ``ai_edge_litert``). Every builtin operator of LiteRT's schema is offered in the versions 1 to 15, as a
model that only names it: a runtime refuses a name or version that it does not know when it loads the model. Prints
JSON, the highest version by operator. ``edgeattn/targets/tflite/versions.py`` holds the answer of
tflite-runtime 2.14.0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

VERSIONS = range(1, 16)
#: Names of the schema that are no operators.
NONE = ("CUSTOM", "DELEGATE", "PLACEHOLDER_FOR_GREATER_OP_CODES")

PROBE = """
import importlib, sys
Interpreter = importlib.import_module(sys.argv[1] + '.interpreter').Interpreter
for line in sys.stdin:
    try:
        Interpreter(model_path=line.strip())
    except Exception as error:
        text = str(error)
        if any(part in text for part in ("Didn't find op", 'out of range', 'Op builtin_code', 'not a valid')):
            continue
    print(line.strip(), flush=True)
"""


def write(code: int, version: int, path: Path) -> None:
    """A model without a graph, whose list of operators holds this one."""
    operator = schema.OperatorCodeT()
    operator.builtinCode, operator.deprecatedBuiltinCode, operator.version = code, min(code, 127), version
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [], [], [], []
    model = schema.ModelT()
    model.version, model.operatorCodes, model.buffers, model.subgraphs = 3, [operator], [schema.BufferT()], [graph]
    builder = flatbuffers.Builder(256)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def known(python: str, module: str) -> dict[str, int]:
    """The highest version of every operator that the runtime loads."""
    codes = {name: code for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in codes.keys() - set(NONE):
            for version in VERSIONS:
                paths.append(Path(folder) / f"{name}-{version}")
                write(codes[name], version, paths[-1])
        words = [python, "-c", PROBE, module]
        listed = "\n".join(map(str, paths))
        done = subprocess.run(words, input=listed, stdout=subprocess.PIPE, text=True, check=True)
    highest: dict[str, int] = {}
    for line in done.stdout.split():
        name, _, version_text = Path(line).name.rpartition("-")
        highest[name] = max(highest.get(name, 0), int(version_text))
    return dict(sorted(highest.items()))


def main() -> None:
    """Print the table."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    print(json.dumps(known(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "tflite_runtime"), indent=1))


if __name__ == "__main__":
    main()
