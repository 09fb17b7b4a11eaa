"""A decoder's steps on a GPU, whose memory keeps the cache: between steps, and for all entries.

A part of ``run.py`` beside ``run_tensorrt.py``; it was never run on a GPU. An engine reads the cache where it lies. Its
new rows cannot be put there by itself: TensorRT wants addresses that are multiples of 256 bytes (NvInferRuntime.h on
setTensorAddress), which those of rows are not, and its own layer for it, IKVCacheUpdateLayer, makes TensorRT for RTX
1.7.1 copy the whole cache before it is read (so say its plans), and is unknown to TensorRT before 10.15. So they go to
a place of their own, and from there to the cache: one copy on the GPU for all tensors of a width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
    from edgeattn.bundle import runner_cuda as cuda_driver
    from edgeattn.bundle import runner_tensorrt as engines
else:
    import run  # run.py, beside this file
    import run_cuda as cuda_driver
    import run_tensorrt as engines

Data = run.Data

#: Where tensors begin, in bytes: what TensorRT wants, and what the driver's copies of rows are sure to take.
APART = 512


def _apart(size: int) -> int:
    return -(-size // APART) * APART


class _Width:
    """The tensors of a cache whose rows are of one width, one behind the other.

    Attributes:
        row: bytes of a row. pitch: bytes from tensor to tensor. new_pitch: the same of their new rows.
    """

    def __init__(self, names: list[str], row: int, context: int, tokens: int, cuda: cuda_driver.Driver) -> None:
        self.names, self.row = names, row
        self.pitch, self.new_pitch = _apart(context * row), _apart(tokens * row)
        self.size = self.pitch * len(names)
        self._begin, self._new = (cuda.memory(size) for size in (self.size, self.new_pitch * len(names)))
        cuda.zero(self._begin, self.size)

    def address(self, name: str, position: int = 0) -> int:
        """Where a tensor's row lies."""
        return self._begin.value + self.names.index(name) * self.pitch + position * self.row

    def new_address(self, name: str) -> int:
        """Where an engine puts a tensor's new rows down."""
        return self._new.value + self.names.index(name) * self.new_pitch

    def write(self, position: int, count: int, cuda: cuda_driver.Driver) -> None:
        """So many new rows of all tensors into the cache, from ``position`` on."""
        at = (position * self.row, count * self.row, len(self.names))
        cuda.copy_rows((self._begin, self.pitch), (self._new, self.new_pitch), *at)


class Cache:
    """A decoder's cache in the GPU's memory: zeros, until rows are written.

    Attributes:
        size: bytes of it. names: of its tensors. widths: by name. cuda: the driver, on whose stream all entries run.
    """

    def __init__(self, part: Data, cuda: cuda_driver.Driver) -> None:
        import numpy as np

        decoder, specs = part["decoder"], [entry["inputs"] for entry in part["entries"].values()]
        types = {spec["name"]: np.dtype(spec["dtype"]) for inputs in specs for spec in inputs}
        tokens = max(spec["shape"][1] for inputs in specs for spec in inputs if spec["name"] == "ids")
        self.context, self.cuda = int(decoder["context"]), cuda
        self.names = [row["name"] for row in decoder["cache"]]
        by_row: dict[int, list[str]] = {}
        for row in decoder["cache"]:
            by_row.setdefault(row["width"] * types[row["name"]].itemsize, []).append(row["name"])
        widths = [_Width(names, row, self.context, tokens, cuda) for row, names in by_row.items()]
        self.widths = {name: width for width in widths for name in width.names}
        self.size = sum(width.size for width in widths)

    def write(self, position: int, count: int) -> None:
        """The new rows of a step into the cache."""
        for width in {id(width): width for width in self.widths.values()}.values():
            width.write(position, count, self.cuda)


class Steps(engines.Opened):
    """An entry of a decoder. Cache rows go up only where the feeds have them, and come down again only then.

    Attributes:
        stateful: see ``runner_generate.Run``. cache_bytes: of the cache, for all entries.
    """

    stateful = True

    def __init__(self, part: Data, entry: str, cache: Cache) -> None:
        super().__init__(part, entry, cache.cuda)
        self._cache, self.cache_bytes = cache, cache.size
        self._inputs = [s for s in self._spec["inputs"] if s["name"] not in cache.names]
        self._outputs = [s for s in self._spec["outputs"] if s["name"][len("new_") :] not in cache.names]
        (self._tokens,) = (s["shape"][1] for s in self._inputs if s["name"] == "ids")
        self._replay: Any = None
        self._runs = 0
        for spec in (*self._inputs, *self._outputs):
            self._place(spec["name"])
        for name in cache.names:
            self.context.set_tensor_address(name, cache.widths[name].address(name))
            self.context.set_tensor_address(f"new_{name}", cache.widths[name].new_address(name))

    def reset(self) -> None:
        """Nothing: rows from ``position`` on are masked, whatever an earlier sequence left there."""

    def upload(self) -> None:
        """Tokens and position to the GPU."""
        for spec in self._inputs:
            self.cuda.upload(self.device[spec["name"]], self.host[spec["name"]])

    def download(self) -> None:
        """Logits from the GPU."""
        for spec in self._outputs:
            self.cuda.download(self.host[spec["name"]], self.device[spec["name"]])

    def write(self) -> None:
        """The new rows into the cache."""
        self._cache.write(self._position, self._tokens)

    @property
    def _position(self) -> int:
        return int(self.host["position"][0])

    def fill(self, feeds: Data) -> None:
        """Tokens and position into the host's buffers, and the cache to the GPU if it is among the feeds.

        Raises:
            run.Problem: 2, the new rows would not fit into the cache.
        """
        import numpy as np

        for spec in self._inputs:
            self.host[spec["name"]][...] = feeds[spec["name"]]
        if not 0 <= self._position <= self._cache.context - self._tokens:
            has = f"position {self._position}, {self._tokens} new rows, {self._cache.context} rows in all"
            raise run.Problem(2, f"the cache has no room for the new rows: {has}")
        for name in self._cache.names:
            if name in feeds:
                self._upload_rows(name, np.ascontiguousarray(feeds[name]))

    def _upload_rows(self, name: str, rows: Any) -> None:
        self.cuda.upload(cuda_driver.pointer(self._cache.widths[name].address(name)), rows)
        self.cuda.wait()

    def own(self, feeds: Data) -> Data:
        """What of the feeds goes up at every step."""
        return {name: value for name, value in feeds.items() if name not in self._cache.names}

    def steps(self) -> Data:
        """See ``Opened.steps``."""
        return {
            "transfer in": self.upload,
            "engine": self.launch,
            "new rows": self.write,
            "transfer out": self.download,
        }

    def _engine(self) -> None:
        """The engine, from the second time on as a CUDA graph where it can be captured."""
        self._runs += 1
        if self._runs == 2:
            try:
                self._replay = self.cuda.graph(self.launch)
            except run.Problem:
                self._replay = None
        (self._replay or self.launch)()

    def __call__(self, feeds: Data) -> Data:
        """Logits; and the new rows, as the cache has them then, where the feeds have the rows before them."""
        self.fill(feeds)
        self.upload()
        self._engine()
        self.write()
        self.download()
        self.cuda.wait()
        found = {spec["name"]: self.host[spec["name"]].astype(spec["dtype"]) for spec in self._outputs}
        if any(name in feeds for name in self._cache.names):
            found.update(self._new_rows())
        return found

    def _new_rows(self) -> Data:
        import numpy as np

        found = {}
        for spec in self._spec["outputs"]:
            name = spec["name"][len("new_") :]
            if name in self._cache.names:
                found[spec["name"]] = rows = np.empty(spec["shape"], spec["dtype"])
                address = self._cache.widths[name].address(name, self._position)
                self.cuda.download(rows, cuda_driver.pointer(address))
        self.cuda.wait()
        return found
