"""NVIDIA's driver API through ctypes, as far as a bundle's ``run.py`` needs it: no CUDA toolkit, no PyTorch.

Python 3.9+ and NumPy. Written against the documented API; it was never run on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file

Data = run.Data

LIBRARY = "libcuda.so.1"
#: What can be done without a GPU.
ANYWHERE = "edgeattn verify BUNDLE compares the typed graph on any machine"


#: CU_MEMORYTYPE_DEVICE.
_DEVICE = 2


class _Pieces(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    ]


class Driver:
    """CUDA's driver API for the first GPU, as far as it is needed here.

    Args:
        library: what ctypes loaded, or something that has its functions.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self("cuInit", 0)
        self._device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(stream), 1)  # beside the default stream
        self.stream = stream

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function; Problem with CUDA's own word where it does not succeed."""
        code = getattr(self._library, name)(*arguments)
        if code:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(word))
            said = (word.value or b"an unknown error").decode()
            nothing = said in ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
            raise run.Problem(3 if nothing else 1, f"{name} of NVIDIA's driver: {said} ({code})", ANYWHERE)

    @property
    def gpu(self) -> Data:
        """Name and compute capability of the GPU, and the newest CUDA that the driver knows."""
        name, driver = ctypes.create_string_buffer(256), ctypes.c_int()
        self("cuDeviceGetName", name, 256, self._device)
        self("cuDriverGetVersion", ctypes.byref(driver))
        numbers = []
        for attribute in (75, 76):  # major and minor of the compute capability
            value = ctypes.c_int()
            self("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            numbers.append(str(value.value))
        version = run._read("/sys/module/nvidia/version") or "unknown"
        cuda = f"{driver.value // 1000}.{driver.value % 1000 // 10}"
        return {"gpu": name.value.decode(), "compute_capability": ".".join(numbers), "driver": version, "cuda": cuda}

    def memory(self, size: int) -> ctypes.c_uint64:
        """Device memory; freed with the process."""
        pointer = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer

    def free_memory(self) -> int:
        """Bytes of device memory that nothing has taken, on the whole GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array in the host's page-locked memory, from which transfers are fastest; freed with the process."""
        import numpy as np

        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        pointer = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), 0)
        raw = (ctypes.c_char * size).from_address(pointer.value or 0)
        return np.frombuffer(raw, dtype, count=int(np.prod(shape))).reshape(shape)

    def upload(self, memory: ctypes.c_uint64, array: Any) -> None:
        """Host to device, on the stream."""
        self("cuMemcpyHtoDAsync_v2", memory, ctypes.c_void_p(array.ctypes.data), _size(array), self.stream)

    def download(self, array: Any, memory: ctypes.c_uint64) -> None:
        """Device to host, on the stream."""
        self("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), memory, _size(array), self.stream)

    def zero(self, memory: ctypes.c_uint64, size: int) -> None:
        """Fill device memory with zeros, on the stream."""
        self("cuMemsetD8Async", memory, ctypes.c_ubyte(0), ctypes.c_size_t(size), self.stream)

    def copy_rows(
        self,
        to: tuple[ctypes.c_uint64, int],
        source: tuple[ctypes.c_uint64, int],
        offset: int,
        size: int,
        count: int,
    ) -> None:
        """Device to device, on the stream: ``count`` pieces of ``size`` bytes.

        Args:
            to, source: where the first piece lies, and how many bytes further the next. offset: of the pieces in
                ``to``; with their size it is no more than that.
        """
        pieces = _Pieces(
            srcMemoryType=_DEVICE,
            srcDevice=source[0],
            srcPitch=source[1],
            dstXInBytes=offset,
            dstMemoryType=_DEVICE,
            dstDevice=to[0],
            dstPitch=to[1],
            WidthInBytes=size,
            Height=count,
        )
        self("cuMemcpy2DAsync_v2", ctypes.byref(pieces), self.stream)

    def wait(self) -> None:
        """Until the stream is empty."""
        self("cuStreamSynchronize", self.stream)

    def event(self) -> ctypes.c_void_p:
        """A new event."""
        made = ctypes.c_void_p()
        self("cuEventCreate", ctypes.byref(made), 0)
        return made

    def timed(self, work: Callable[[], None], begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """How long the GPU takes for what ``work`` puts on the stream, in ms."""
        self("cuEventRecord", begin, self.stream)
        work()
        self("cuEventRecord", end, self.stream)
        self("cuEventSynchronize", end)
        took = ctypes.c_float()
        self("cuEventElapsedTime", ctypes.byref(took), begin, end)
        return took.value

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` captured as a CUDA graph, to be launched as one."""
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuStreamBeginCapture_v2", self.stream, 2)  # relaxed: TensorRT may look things up meanwhile
        try:
            work()
        except BaseException:
            self._library.cuStreamEndCapture(self.stream, ctypes.byref(graph))  # or the stream stays in capture
            raise
        self("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_uint64(0))
        return lambda: self("cuGraphLaunch", made, self.stream)


def pointer(address: int) -> ctypes.c_uint64:
    """An address in device memory, as the driver takes it."""
    return ctypes.c_uint64(address)


def _size(array: Any) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


def driver() -> Driver:
    """The driver of this machine.

    Raises:
        run.Problem: 3, there is no NVIDIA driver or no GPU.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise run.Problem(3, "no NVIDIA GPU here: its driver is not installed", ANYWHERE) from None
    return Driver(library)
