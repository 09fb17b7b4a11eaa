"""Decoding at PLM-1.8B's shapes: our latent cache with absorbed weights, our expanded form, and llama.cpp, interleaved.

    python benchmarks/plm_decode.py [--layers 8] [--contexts 128 512 1024 2048 4096] [--rounds 9] [--llama PYTHON]

The weights are random, and the depth is cut to ``--layers`` of 32, the vocabulary to 32,768 of 151,936, so that all
three fit beside each other; both are printed. Weights have 4.5 bits in all of them: llama.cpp's Q4_0 are blocks of 32
with a scale in float16, ours are blocks of 64 with one in float32, the only kind that ONNX Runtime multiplies float32
data with. Each runs in a process of its own with two threads, and they take turns: in every round each decodes a few
tokens behind the same number of cached ones. ``--llama`` is a Python that has llama-cpp-python, if this one has not.

Printed are tokens a second, ratios over the rounds with their spread, the bytes that a token has to move, and what
share of this machine's copy bandwidth (read and written bytes, two threads, measured between the rounds) that is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

VOCABULARY, CONTEXT, THREADS, TOKENS = 32768, 4096, 2, 8
#: Seconds before each turn: threads of the runtime that has just had its own go on spinning for a while.
SETTLED = 0.2
HEADS, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512


def expanded_step(model: Any) -> Any:
    """The deploy form's decode with keys and values of every head in the cache, as other runtimes keep them."""
    import torch
    from torch import Tensor, nn

    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
            body = self.model.model
            x = body.embed_tokens(ids[0])
            cos, sin = self.model._angles(position)
            new: list[Tensor] = []
            for i, layer in enumerate(body.layers):
                normed, attention = layer.input_layernorm(x), layer.self_attn
                q_nope, q_rope = attention.queries(normed, cos, sin)
                latent, k_rope = attention.rows(normed, cos, sin)
                up = attention.kv_b_proj
                key = nn.functional.linear(latent, up.up_k.reshape(-1, LATENT)).view(HEADS, 1, NOPE)
                key = torch.cat([key, k_rope[None].expand(HEADS, 1, ROPE)], dim=-1)
                value = nn.functional.linear(latent, up.up_v.reshape(-1, LATENT)).view(HEADS, 1, VALUE)
                q = torch.cat([q_nope, q_rope], dim=-1).view(HEADS, 1, NOPE + ROPE) * (NOPE + ROPE) ** -0.5
                scores = torch.cat([q @ cache[2 * i].transpose(1, 2), q @ key.transpose(1, 2)], dim=-1)
                weights = torch.softmax(scores, dim=-1)
                out = weights[:, :, :-1] @ cache[2 * i + 1] + weights[:, :, -1:] @ value
                x = x + attention.o_proj(out.view(1, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
                new += [key, value]
            return (self.model._logits(x), *new)

    return Expanded().eval()


def make(layers: int, folder: Path) -> dict[str, Any]:
    """Write latent.onnx, expanded.onnx and model.gguf; bytes of the weights that a token reads, of each."""
    import torch

    from edgeattn import targets
    from edgeattn.capture import Entry
    from edgeattn.capture.decoder import caches_of, capture_decoder
    from edgeattn.core.specs import StepShape
    from edgeattn.models.plm import plm
    from edgeattn.quant.plan import QuantPlan
    from edgeattn.reparam import reparameterize
    from edgeattn.targets.base import LowerPlan
    from edgeattn.targets.onnx_graph.blocks import blocks
    from edgeattn.targets.onnx_graph.export import export, name_nodes
    from edgeattn.targets.onnx_graph.files import save, weight_bytes

    torch.manual_seed(0)
    model = plm(num_hidden_layers=layers, vocab_size=VOCABULARY).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    deploy: Any = reparameterize(model, torch.zeros(1, 4, dtype=torch.int64), shared=True).model
    shapes = [StepShape("decode", 1, CONTEXT, True), StepShape("prefill_128", 128, CONTEXT, True)]  # as in a bundle
    program = capture_decoder(deploy, caches_of(deploy, CONTEXT), shapes)
    quant = QuantPlan("w4", group=64)
    for name in ("onnx", "gguf"):
        target = targets.get(name)
        (folder / name).mkdir()
        plan = LowerPlan("w4", [], {}, options=target.settle({}, None, "w4"), quant=quant)
        target.lower(program, plan, folder / name)
    step = expanded_step(deploy)
    cache = [torch.zeros(HEADS, 5, width) for _ in range(layers) for width in (NOPE + ROPE, VALUE)]
    rows = torch.export.Dim("rows", min=1, max=CONTEXT)
    dims = {"ids": None, "position": None, "cache": tuple({1: rows} for _ in cache)}
    inputs = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *cache)
    graph = torch.export.export(step, inputs, dynamic_shapes=dims)
    names = [f"{kind}_{i}" for i in range(layers) for kind in ("key", "value")]
    outputs = ("logits", *(f"new_{name}" for name in names))
    wide = export(Entry(graph, ("ids", "position", *names), outputs))
    name_nodes(wide)
    blocks(wide, quant)
    save(wide, folder / "expanded.onnx")
    sizes = {"latent": folder / "onnx", "llama.cpp": folder / "gguf"}
    return {
        "latent": sum(file.stat().st_size for file in sizes["latent"].iterdir()),
        "expanded": weight_bytes(wide),
        "llama.cpp": sum(file.stat().st_size for file in sizes["llama.cpp"].iterdir()),
    }


def serve_onnx(path: Path, kind: str, layers: int) -> Callable[[int], list[float]]:
    """Seconds a token behind so many cached ones, for our graphs, run as a bundle's run.py does."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    shapes = {"latent": (1, LATENT), "rope": (1, ROPE), "key": (HEADS, NOPE + ROPE), "value": (HEADS, VALUE)}
    names = ("latent", "rope") if kind == "latent" else ("key", "value")
    held: dict[int, dict[str, Any]] = {}

    def measure(context: int) -> list[float]:
        if context not in held:
            held.clear()
            held[context] = {
                f"{name}_{i}": rng.standard_normal((shapes[name][0], context, shapes[name][1]), np.float32)
                for i in range(layers)
                for name in names
            }
        feeds = {"ids": np.array([[7]]), "position": np.array([min(context, CONTEXT - 1)]), **held[context]}
        times = []
        for _ in range(TOKENS):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
        return times

    return measure


def serve_llama(path: Path) -> Callable[[int], list[float]]:
    """The same for llama.cpp: the tokens before are computed once for each context, and those after taken back."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT + 64, n_threads=THREADS, n_threads_batch=THREADS, flash_attn=False, verbose=False
    )
    rng = np.random.default_rng(0)

    def measure(context: int) -> list[float]:
        if llama.n_tokens > context:
            llama.reset()
        if llama.n_tokens < context:
            llama.eval(rng.integers(0, VOCABULARY, context - llama.n_tokens).tolist())
        times = []
        for _ in range(TOKENS):
            start = time.perf_counter()
            llama.eval([7])
            times.append(time.perf_counter() - start)
        llama.n_tokens = context
        llama._ctx.kv_cache_seq_rm(-1, context, -1)
        return times

    return measure


def serve(kind: str, path: Path, layers: int) -> None:
    """Answer contexts on standard input with times, one JSON line each."""
    measure = serve_llama(path) if kind == "llama.cpp" else serve_onnx(path, kind, layers)
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), flush=True)


class Worker:
    """A process that answers with times."""

    def __init__(self, python: str, kind: str, path: Path, layers: int) -> None:
        command = [python, __file__, "--serve", kind, str(path), "--layers", str(layers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, context: int) -> float:
        """Median seconds a token."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{context}\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise SystemExit("a runtime ended without an answer")
        return statistics.median(json.loads(answer)[2:])  # the first ones find the caches full of others' data

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def copy_bandwidth() -> float:
    """GB/s of copying 256 MB with two threads, bytes read and bytes written counted."""
    import torch

    torch.set_num_threads(THREADS)
    source, target = torch.ones(64_000_000), torch.zeros(64_000_000)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9


def cache_bytes(kind: str, layers: int, context: int) -> int:
    """Bytes of the cache that a token reads: ours in float32, llama.cpp's in float16."""
    if kind == "latent":
        return layers * context * (LATENT + ROPE) * 4
    return layers * context * HEADS * (NOPE + ROPE + VALUE) * (2 if kind == "llama.cpp" else 4)


def run(layers: int, contexts: Sequence[int], rounds: int, llama: str) -> None:
    """Print the table."""
    from benchmarks.measure import ratio

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--make", name, "--layers", str(layers)]
        sizes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        paths = {"latent": folder / "onnx/model.onnx", "expanded": folder / "expanded.onnx"}
        workers = {kind: Worker(sys.executable, kind, path, layers) for kind, path in paths.items()}
        workers["llama.cpp"] = Worker(llama, "llama.cpp", folder / "gguf/model.gguf", layers)
        print(f"PLM-1.8B's shapes, {layers} of 32 layers, vocabulary {VOCABULARY}, random weights, {THREADS} threads")
        print("weights: " + ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sizes.items()))
        for context in contexts:
            times: dict[str, list[float]] = {kind: [] for kind in workers}
            for worker in workers.values():
                worker.ask(context)  # caches are filled, and everything is warm
            bandwidths = []
            for _ in range(rounds):
                for kind, worker in workers.items():
                    time.sleep(SETTLED)
                    times[kind].append(worker.ask(context))
                time.sleep(SETTLED)
                bandwidths.append(copy_bandwidth())
            bandwidth = statistics.median(bandwidths)
            print(f"\ncontext {context}, copy bandwidth {bandwidth:.1f} GB/s")
            for kind, each in times.items():
                moved, took = sizes[kind] + cache_bytes(kind, layers, context), statistics.median(each)
                rate = moved / took / 1e9
                print(
                    f"  {kind:10} {1 / took:6.1f} tokens/s  {took * 1e3:6.1f} ms  {moved / 1e6:6.0f} MB a token  "
                    f"{rate:5.1f} GB/s, {rate / bandwidth:4.0%} of the copy bandwidth"
                )
            for kind in ("llama.cpp", "expanded"):
                print(f"  latent against {kind}: {ratio(times[kind], times['latent'])} as many tokens/s")
        for worker in workers.values():
            worker.close()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--llama", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), options.layers)
    elif options.make:
        print(json.dumps(make(options.layers, Path(options.make))))
    else:
        run(options.layers, options.contexts, options.rounds, options.llama)


if __name__ == "__main__":
    main()
