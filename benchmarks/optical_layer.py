"""One ConvShareViT layer on simulated ideal planes: ours against ``optnn``, and against nothing but its own transforms.

    python benchmarks/optical_layer.py --make-peer      # once: optnn 0.1 from PyPI, in an environment of its own
    python benchmarks/optical_layer.py [--layers v2-qkv v1-qkv] [--batch 8] [--rounds 15] [--threads 1] [--signed]

The layer is the shared convolution that makes queries, keys and values: every token of a batch, K kernels. Inputs and
kernels are not negative, so that one pass is enough for optnn, which reads amplitudes; with ``--signed`` kernels have
both signs, and optnn shows their two parts one after the other (``pseudo_negativity``). Its noise is off.

The same values are computed twice by us: all that optnn returns (a "same" window as large as the map), and what the
layer wants (valid). Both are compared with a plain convolution before anything is timed. optnn shifts all axes where it
means the two of the image, once of its masks and once of its result: outputs come back in another order than images
(rolled by half their number) and kernels, which is undone for the comparison, as is the rotation by 180 degrees.

On ideal planes numbers do not depend on where a tile lies, so that ours are smaller than the device's; "as planned" is
every frame on the device's planes all the same. "FFTs alone": rfft2 of as many input planes and irfft2 of as many
frames, of the same sizes and in the same groups, as ours shows: no tiles, no masks, nothing read. Turns are
interleaved, optnn in a process of its own that waits meanwhile; masks are warm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PEER = "optnn==0.1"
#: Pixels of frames at a time: the transforms alone are as fast as they get.
CACHED = 1 << 18


@dataclass(frozen=True)
class Layer:
    """A shared convolution: ``tokens`` an image, each a map of ``side``; ``kernels`` of ``size``."""

    tokens: int
    side: int
    size: int
    kernels: int


#: Sizes of the recipes convsharevit-v1 and -v2 (edgeattn/models/convsharevit.py, SIZES).
LAYERS = {
    "v2-qkv": Layer(64, 16, 9, 3 * 8),
    "v1-qkv": Layer(64, 8, 8, 3 * 64),
    "v2-mlp": Layer(64, 16, 9, 4),
}


def typical(call: Callable[[], Any], spent: float = 0.5, least: int = 3) -> float:
    """Seconds a call: the median of as many as fit into ``spent`` seconds, at least ``least``.

    Not the best of them: a call of seconds, made thrice, would find fewer quiet moments than one of milliseconds.
    """
    taken: list[float] = []
    end = time.perf_counter() + spent
    while time.perf_counter() < end or len(taken) < least:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# --- the peer's process: nothing of EdgeAttn is imported there ------------------------------------------------------


def peer(threads: int) -> None:
    """Answer orders on standard input: load a layer, write its outputs, take the time."""
    from optnn import OpticalConv2d

    torch.set_num_threads(threads)
    answer, sys.stdout = sys.stdout, sys.stderr
    run: Callable[[], torch.Tensor] | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            order = json.loads(line)
            said = 0.0
            if order["do"] == "load":
                given = np.load(order["file"])
                x, kernels = torch.from_numpy(given["x"]), torch.from_numpy(given["kernels"])
                layer = OpticalConv2d(
                    1, len(kernels), kernels.shape[-1], False, order["signed"], x.shape[-1], noise=False
                )
                layer.kernel.copy_(kernels)
                run = partial(layer, x)
                np.save(order["out"], run().numpy())
            elif run is not None:
                said = typical(run)
            print(json.dumps(said), file=answer, flush=True)


class Peer:
    """optnn in a process of its own."""

    def __init__(self, python: Path, threads: int) -> None:
        command = [str(python), __file__, "--peer", "--threads", str(threads)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "Agg"}
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
        )

    def _ask(self, **order: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"optnn's process ended with {self._process.wait()}")
        return float(json.loads(line))

    def load(self, x: torch.Tensor, kernels: torch.Tensor, signed: bool) -> torch.Tensor:
        """Its outputs (rows, K, M, M), in order and upright.

        Args:
            x: (rows, 1, M, M). kernels: (K, 1, N, N), as they convolve.
        """
        with tempfile.TemporaryDirectory() as folder:
            given, out = Path(folder) / "given.npz", Path(folder) / "out.npy"
            np.savez(given, x=x.numpy(), kernels=kernels.numpy())
            self._ask(do="load", file=str(given), out=str(out), signed=signed)
            y = torch.from_numpy(np.load(out))
        back = -(len(x) // 2), -2 * (len(kernels) // 2)
        return y.roll(back, (0, 1)).flip(-2, -1)

    def seconds(self) -> float:
        """Of a call."""
        return self._ask(do="time")

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def peer_python(options: argparse.Namespace) -> Path | None:
    """The Python of the peer's environment; made where that is asked for. None where there is none."""
    if options.peer_python:
        return Path(options.peer_python)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = base / "edgeattn" / "benchmarks" / PEER.replace("==", "-")
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if options.make_peer and not python.exists():
        # The same torch as ours: of its transforms both are made.
        same = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER, same], check=True)
        print(f"made {place}")
    return python if python.exists() else None


# --- ours -----------------------------------------------------------------------------------------------------------


def apart(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2."""
    return float((seen.double() - wanted.double()).norm() / wanted.double().norm())


class Ours:
    """A layer by ``Convolver``, its transforms alone, and the convolution that both stand for.

    Args:
        x: (rows, 1, M, M). kernels: (K, 1, N, N), as they convolve.
        same: all that optnn returns instead of the valid values alone.
    """

    def __init__(self, layer: Layer, x: torch.Tensor, kernels: torch.Tensor, same: bool) -> None:
        from edgeattn import device
        from edgeattn.targets.optical.convolve import Convolver, direct, fast_size
        from edgeattn.targets.optical.schedule import Workload

        m, n, k = layer.side, layer.size, layer.kernels
        first, out = ((n - 1) // 2, m) if same else (n - 1, m - n + 1)
        work = Workload("", len(x), 1, 1, k, (m, m), (n, n), (first, first), (out, out))
        optics = device.resolve("optical-4f-4k-2mhz").optics
        assert optics is not None
        self._maps, self._kernels, self._work, self._direct = x[:, None], kernels[None], work, direct
        self._convolver = Convolver(self._kernels, work, optics)
        self._planned = Convolver(self._kernels, work, optics, as_planned=True)
        self.plan = self._convolver.simulated(len(x))
        plane, extent = self.plan.plane, self.plan.extent
        self.period = fast_size(extent[0], plane[0]), fast_size(extent[1], plane[1])
        at_once = max(1, min(self.plan.inputs, CACHED // math.prod(self.period)))
        self._planes = torch.rand(self.plan.inputs, *self.period).split(at_once)
        self._spectra = torch.fft.rfft2(torch.rand(self.plan.frames, *self.period)).split(at_once)

    def run(self) -> torch.Tensor:
        """(rows, K, out, out)."""
        return self._convolver(self._maps)[:, 0]

    def planned(self) -> torch.Tensor:
        """The same on the device's planes."""
        return self._planned(self._maps)[:, 0]

    def plain(self) -> torch.Tensor:
        """The same, by ``F.conv2d``."""
        return self._direct(self._maps, self._kernels, self._work)[:, 0]

    def transforms(self) -> None:
        """The two FFTs alone."""
        for planes in self._planes:
            torch.fft.rfft2(planes)
        for frames in self._spectra:
            torch.fft.irfft2(frames, s=self.period)


def compare(name: str, options: argparse.Namespace, other: Peer | None) -> None:
    """Check and time one layer."""
    from benchmarks.measure import ratio

    layer, generator = LAYERS[name], torch.Generator().manual_seed(0)
    rows = options.batch * layer.tokens
    x = torch.rand(rows, 1, layer.side, layer.side, generator=generator)
    kernels = torch.rand(layer.kernels, 1, layer.size, layer.size, generator=generator) - 0.5 * options.signed
    ours = {"same window": Ours(layer, x, kernels, True), "valid": Ours(layer, x, kernels, False)}
    print(
        f"\n{name}: {options.batch} images x {layer.tokens} tokens, maps {layer.side} x {layer.side}, "
        f"{layer.kernels} kernels of {layer.size} x {layer.size}, {options.threads} thread(s)"
    )
    for what, one in ours.items():
        plan = one.plan
        print(
            f"  ours, {what}: relative L2 {apart(one.run(), one.plain()):.1e} to a plain convolution, "
            f"{apart(one.planned(), one.plain()):.1e} as planned; "
            f"{plan.frames} frame(s) of {one.period[0]} x {one.period[1]}, {plan.inputs} input plane(s)"
        )
    if other is not None:
        theirs = other.load(x, kernels, options.signed)
        window = ours["same window"]
        m, n = layer.side, layer.size
        first = n - 1 - (n - 1) // 2
        middle = theirs[..., first : first + m - n + 1, first : first + m - n + 1]
        print(
            f"  optnn: relative L2 {apart(theirs, window.plain()):.1e} to a plain convolution, all it returns; "
            f"{apart(middle, ours['valid'].plain()):.1e} the valid values"
        )
    calls: dict[str, Callable[[], float]] = {}
    for what, one in ours.items():
        calls[f"ours, {what}"] = partial(typical, one.run)
        calls[f"as planned, {what}"] = partial(typical, one.planned)
        calls[f"FFTs alone, {what}"] = partial(typical, one.transforms)
        calls[f"F.conv2d, {what}"] = partial(typical, one.plain)
    if other is not None:
        calls["optnn"] = other.seconds
    taken: dict[str, list[float]] = {what: [] for what in calls}
    for turn in range(options.rounds):
        for what in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            taken[what].append(calls[what]())
    for what, spent in taken.items():
        print(f"  {what}: {np.median(spent) * 1e3:.2f} ms")
    for what in ours:
        mine = taken[f"ours, {what}"]
        if other is not None:
            print(f"  optnn / ours, {what}: {ratio(taken['optnn'], mine)}")
            print(f"  optnn / as planned, {what}: {ratio(taken['optnn'], taken[f'as planned, {what}'])}")
        print(f"  ours / FFTs alone, {what}: {ratio(mine, taken[f'FFTs alone, {what}'])}")
        print(f"  ours / F.conv2d, {what}: {ratio(mine, taken[f'F.conv2d, {what}'])}", flush=True)


def main() -> None:
    """Check and time the layers; a hidden option is the peer's process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=["v2-qkv", "v1-qkv"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--signed", action="store_true", help="kernels of both signs")
    parser.add_argument("--peer-python", help="Python of an environment that has optnn")
    parser.add_argument("--make-peer", action="store_true", help=f"make one with {PEER} in the user's cache folder")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.threads)
        return
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(options.threads)
    python = peer_python(options)
    if python is None:
        print("optnn is not compared with: no environment of it; --make-peer makes one, --peer-python names one")
    other = None if python is None else Peer(python, options.threads)
    with torch.inference_mode():
        for name in options.layers:
            compare(name, options, other)
    if other is not None:
        other.close()


if __name__ == "__main__":
    main()
