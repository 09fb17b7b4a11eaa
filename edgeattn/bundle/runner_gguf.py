"""The GGUF part of a bundle's ``run.py``: llama.cpp, which keeps the cache itself. Python 3.9+, llama-cpp-python."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file

Data = dict[str, Any]
#: ggml's number for float32.
_F32 = 0

_opened: dict[tuple[str, int], Sequence] = {}


class Sequence:
    """One sequence of tokens; all entries of a file continue the same one.

    Called with ``ids`` (1, N), ``position`` and ``last`` it gives ``logits`` (1, vocabulary). It goes back to any
    earlier position; tokens that it was not given itself it cannot know of, and behind them it gives nothing.

    Attributes:
        stateful: the cache is in here: none is taken, and no new rows are given.
    """

    stateful = True

    def __init__(self, part: Data, path: str, threads: int) -> None:
        import llama_cpp

        # Beside float32 weights a cache in float16, llama.cpp's default, would be all of the difference.
        cache = {"type_k": _F32, "type_v": _F32} if part["precision"] == "fp32" else {}
        # With flash attention llama.cpp aborts on heads of 192 and 128.
        self._model = llama_cpp.Llama(
            path,
            n_ctx=part["decoder"]["context"],
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=False,
            verbose=False,
            **cache,
        )
        self._logits = llama_cpp.llama_get_logits_ith

    def reset(self) -> None:
        """Begin anew."""
        self._model.reset()

    def __call__(self, feeds: Data) -> Data:
        """See the class."""
        import numpy as np

        position, ids = int(feeds["position"][0]), feeds["ids"][0]
        if position > self._model.n_tokens:
            return {}
        self._model.n_tokens = position  # what comes after it in the cache is dropped
        self._model.eval(ids[: int(feeds["last"][0]) + 1 if "last" in feeds else len(ids)].tolist())
        logits = np.ctypeslib.as_array(self._logits(self._model.ctx, -1), shape=(1, self._model.n_vocab()))
        return {"logits": logits.copy()}


def open_entry(part: Data, entry: str, threads: int) -> tuple[run.Run, str]:
    """A function from inputs to outputs by name, and the runtime's name and version."""
    path = run.place(part["entries"][entry]["file"])
    if (path, threads) not in _opened:
        _opened[path, threads] = Sequence(part, path, threads)
    return _opened[path, threads], f"llama-cpp-python {metadata.version('llama-cpp-python')}"
