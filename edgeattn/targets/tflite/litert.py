"""Opening LiteRT's interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeattn.core.errors import CheckFailed


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """LiteRT greets on standard error, past Python, for every delegate that it makes."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def interpreter(source: Path | bytes, *, delegate: bool = True, **options: Any) -> Any:
    """LiteRT's interpreter of a file or its bytes, tensors allocated; that of tflite-runtime where it alone is here.

    Args:
        delegate: let XNNPACK take what it can, as runtimes do by default.

    Raises:
        CheckFailed: the runtime cannot load the file.
    """
    try:
        from ai_edge_litert import interpreter as module
    except ImportError:
        from tflite_runtime import interpreter as module
    given = {"model_content": source} if isinstance(source, bytes) else {"model_path": str(source)}
    if not delegate:
        options["experimental_op_resolver_type"] = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with _silent():
            # Half of the cores: more threads than free cores slow small operations tenfold.
            opened = module.Interpreter(**given, num_threads=max(1, (os.cpu_count() or 1) // 2), **options)
            opened.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        where = None if isinstance(source, bytes) else str(source)
        raise CheckFailed("LiteRT cannot load the file", where=where, why=str(error).splitlines()[0]) from error
    return opened
