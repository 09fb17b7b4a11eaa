"""A decoder's entries under LiteRT, whose own input buffers hold the cache.

Also a part of ``run.py``, as run_steps.py: standard library and the runtime alone, Python 3.9 and newer.
"""

from __future__ import annotations

from typing import Any

Data = dict[str, Any]


class Steps:
    """An entry of an interpreter: outputs for inputs, of which the rows of the cache may be written in place instead.

    LiteRT's own signature runner copies every input at every run: of 4,096 rows of a layer of PLM-1.8B, 0.7 ms.

    Args:
        interpreter: LiteRT's or tflite-runtime's, which no other sequence of tokens uses.

    Attributes:
        views: the input buffers (1, P, width) of the cache, by name; zeros, until they are written. A run leaves them
            as they are. They are valid as long as the interpreter is.
    """

    def __init__(self, interpreter: Any, entry: str) -> None:
        # Python has no public name for the buffers of any signature but the first: the interpreter's own wrapper does.
        self._wrapper = interpreter._interpreter
        signature = interpreter._get_full_signature_list()[entry]
        self._inputs, self._outputs = signature["inputs"], signature["outputs"]
        self._graph = self._wrapper.GetSubgraphIndexFromSignature(entry)
        self._wrapper.AllocateTensors(self._graph)
        self.views = {
            name: self._wrapper.tensor(interpreter, index, self._graph)
            for name, index in self._inputs.items()
            if f"new_{name}" in self._outputs
        }
        for view in self.views.values():
            view[...] = 0

    def __call__(self, feeds: Data) -> Data:
        """Outputs by name; rows of the cache that are among the feeds are copied in first, all of them."""
        for name, value in feeds.items():
            self._wrapper.SetTensor(self._inputs[name], value, self._graph)
        self._wrapper.Invoke(self._graph)
        return {name: self._wrapper.GetTensor(index, self._graph) for name, index in self._outputs.items()}
