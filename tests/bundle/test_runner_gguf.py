"""The runner's part for llama.cpp, with a stand-in for it; ``tests/targets/test_gguf.py`` asks the real one."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgeattn.bundle import runner
from edgeattn.bundle.bundle import RUNNER
from edgeattn.bundle.runner_generate import Session

SOURCE = RUNNER.with_name("runner_gguf.py")
ENTRIES: dict[str, Any] = {
    name: {
        "file": "model.gguf",
        "inputs": [
            {"name": "ids", "dtype": "int64", "shape": [1, most], "dynamic": [[1, 1, most, most]] if most > 1 else []},
            {"name": "position", "dtype": "int64", "shape": [1], "dynamic": []},
            {"name": "latent_0", "dtype": "float32", "shape": [1, 16, 4], "dynamic": [[1, 1, 16, 16]]},
        ],
        "outputs": [{"name": "logits"}, {"name": "new_latent_0"}],
    }
    for name, most in (("decode", 1), ("prefill_8", 8))
}
DECODER = {"context": 16, "cache": [{"name": "latent_0", "width": 4}]}
PART: dict[str, Any] = {"backend": "gguf", "precision": "w8", "decoder": DECODER, "entries": ENTRIES, "facts": {}}
VOCABULARY = 5


class Llama:
    """What the part uses of ``llama_cpp.Llama``; logits are the sum of all tokens that it has, and their number."""

    made: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, path: str, **options: Any) -> None:
        self.made.append({"path": path, **options})
        self.n_tokens, self.ctx, self.tokens = 0, self, [0] * options["n_ctx"]
        self.held: Any = None

    def n_vocab(self) -> int:
        return VOCABULARY

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: list[int]) -> None:
        end = self.n_tokens + len(tokens)
        self.tokens[self.n_tokens : end] = tokens
        self.n_tokens = end


def expected(tokens: list[int]) -> list[float]:
    return [sum(tokens), len(tokens), 0, 0, 0]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as run.py imports it in a bundle."""
    library = ModuleType("llama_cpp")
    library.Llama = Llama  # type: ignore[attr-defined]

    def logits(ctx: Llama, index: int) -> Any:
        assert index == -1
        ctx.held = (ctypes.c_float * VOCABULARY)(*expected(ctx.tokens[: ctx.n_tokens]))
        return ctypes.cast(ctx.held, ctypes.POINTER(ctypes.c_float))

    library.llama_get_logits_ith = logits  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setitem(sys.modules, "run", runner)
    spec = importlib.util.spec_from_file_location("run_gguf", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.metadata, "version", lambda name: "0.3.36")
    Llama.made.clear()
    return module


def ids(*tokens: int) -> dict[str, Any]:
    return {"ids": np.array([tokens])}


def test_it_is_python_3_9_and_imports_the_standard_library_at_the_top() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "importlib", "typing"}
    assert not any(isinstance(n, ast.Import) for n in tree.body)


def test_a_text_is_continued_and_gone_back_in(part: Any) -> None:
    run, runtime = part.open_entry(PART, "prefill_8", 3)
    assert runtime == "llama-cpp-python 0.3.36"
    assert run({**ids(1, 2, 3), "position": np.array([0])})["logits"].tolist() == [expected([1, 2, 3])]
    again, _ = part.open_entry(PART, "decode", 3)
    assert again is run
    assert run({**ids(7), "position": np.array([3])})["logits"].tolist() == [expected([1, 2, 3, 7])]
    assert run({**ids(9), "position": np.array([1])})["logits"].tolist() == [expected([1, 9])]
    # It was not given the tokens before these.
    assert run({**ids(9), "position": np.array([8])}) == {}
    padded = {**ids(4, 5, 0, 0), "position": np.array([0]), "last": np.array([1])}
    assert run(padded)["logits"].tolist() == [expected([4, 5])]
    (made,) = Llama.made
    assert made["flash_attn"] is False
    assert (made["n_ctx"], made["n_threads"], made["n_threads_batch"]) == (16, 3, 3)
    assert "type_k" not in made


def test_a_float32_file_has_a_float32_cache(part: Any) -> None:
    part.open_entry({**PART, "precision": "fp32"}, "decode", 1)
    assert (Llama.made[0]["type_k"], Llama.made[0]["type_v"]) == (0, 0)


def test_a_session_generates_with_it(part: Any) -> None:
    session = Session(DECODER, ENTRIES, lambda entry: part.open_entry(PART, entry, 1)[0])
    assert session.feed(np.arange(10)).tolist() == expected(list(range(10)))
    assert session.feed(np.array([3])).tolist() == expected([*range(10), 3])
    session.reset()
    assert session.feed(np.array([3])).tolist() == expected([3])


def test_golden_samples_are_compared_where_it_can_answer(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((1, 1, 4), np.float32)
    samples = {
        "golden/decode-000.npz": ([2], 0, expected([2])),
        "golden/decode-001.npz": ([2], 5, [9.0] * 5),  # behind a cache that it did not fill
        "golden/prefill_8-000.npz": ([2, 3, 4], 0, expected([2, 3, 4])),
    }

    def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        tokens, position, logits = samples[name]
        feeds = {**ids(*tokens), "position": np.array([position]), "latent_0": rows}
        return feeds, {"logits": np.array([logits], np.float32), "new_latent_0": rows}

    monkeypatch.setattr(runner, "golden_data", golden)
    monkeypatch.setattr(runner, "own", lambda backend: {"llama": part}[backend])
    monkeypatch.setattr(runner, "runtime_name", lambda part: "llama-cpp-python")
    manifest = {**PART, "files": samples, "tolerance": 1e-6}
    opened = {**PART, "runtimes": []}
    result = runner.compare_golden(manifest, opened, lambda entry: runner.open_entry(opened, entry, 1))
    assert (result["golden"], result["worst_relative_l2"], result["holds"]) == (2, 0.0, True)
    samples["golden/prefill_8-000.npz"] = ([2, 3, 4], 0, expected([2, 3, 5]))
    result = runner.compare_golden(manifest, opened, lambda entry: runner.open_entry(opened, entry, 1))
    assert (result["worst_at"], result["holds"]) == ("logits of golden/prefill_8-000.npz", False)
    for name in ("golden/decode-000.npz", "golden/prefill_8-000.npz"):
        del samples[name]
    result = runner.compare_golden(
        manifest, opened, lambda entry: runner.open_entry({**opened, "precision": "w4"}, entry, 2)
    )
    assert (result["golden"], result["holds"]) == (0, False)


def test_the_runner_knows_what_to_install() -> None:
    problem = runner.lacking([{**PART, "requirement": "llama-cpp-python"}])
    assert problem.fix == "python3 -m pip install numpy llama-cpp-python"
    assert Path(SOURCE).is_file()
