"""A sequence of tokens against a model that shows every fault of a cache: its logits depend on each row's place."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.bundle.bundle import RUNNER
from edgeattn.bundle.runner_generate import FEW, Full, Session

CONTEXT, VOCABULARY = 48, 11
CACHE = [{"name": "latent_0", "width": 3}, {"name": "rope_0", "width": 2}]
DECODER = {"context": CONTEXT, "vocabulary": VOCABULARY, "cache": CACHE}
#: (tokens, rows, dynamic) by entry, as targets make them.
DYNAMIC = {"decode": (1, CONTEXT, True), "prefill_4": (4, CONTEXT, True), "prefill_16": (16, CONTEXT, True)}
WHOLE = {"decode": (1, CONTEXT, False), "prefill_4": (4, CONTEXT, False), "prefill_16": (16, CONTEXT, False)}
BUCKETS = {f"{name}_{rows}": (n, rows, False) for rows in (8, CONTEXT) for name, n in (("decode", 1), ("prefill_6", 6))}
WITHOUT_PREFILL = {"decode": (1, CONTEXT, True)}
ALL = {"dynamic": DYNAMIC, "whole": WHOLE, "buckets": BUCKETS, "decode alone": WITHOUT_PREFILL}


def entries(shapes: dict[str, tuple[int, int, bool]], dtype: str = "float32", ids: str = "int64") -> dict[str, Any]:
    """As a manifest has them."""

    def spec(name: str, shape: list[int], kind: str, top: int = 0) -> dict[str, Any]:
        return {"name": name, "shape": shape, "dtype": kind, **({"dynamic": [[1, 1, top, top]]} if top else {})}

    made = {}
    for name, (tokens, rows, dynamic) in shapes.items():
        inputs = [spec("ids", [1, tokens], ids, tokens * (dynamic and tokens > 1)), spec("position", [1], ids)]
        inputs += [spec("last", [1], ids)] if tokens > 1 and not dynamic else []
        inputs += [spec(row["name"], [1, rows, row["width"]], dtype, rows * dynamic) for row in CACHE]
        made[name] = {"inputs": inputs, "outputs": []}
    return made


def rows_of(ids: np.ndarray, begin: int) -> dict[str, np.ndarray]:
    """What the model writes down for tokens: (N, width) each."""
    places = begin + np.arange(len(ids))
    return {
        "latent_0": np.stack([ids + 1.0, places + 1.0, ids * places], 1),
        "rope_0": np.stack([ids * 2.0 + 1, ids - places], 1),
    }


def logits_of(rows: dict[str, np.ndarray]) -> np.ndarray:
    """(vocabulary,) of all rows so far: a change of any row, or of its place, shows."""
    count = len(rows["latent_0"])
    weights = np.sin(1.0 + np.arange(count))[:, None]
    seen = np.concatenate([(weights * rows[row["name"]]).sum(0) for row in CACHE])
    return np.cos(np.arange(VOCABULARY)[:, None] * 0.37 + np.arange(len(seen)) * seen / 1000).sum(1)


def reference(ids: list[int]) -> np.ndarray:
    return logits_of(rows_of(np.array(ids), 0))


class Model:
    """Runs entries, and notes (entry, tokens, rows) of every run. ``kind``: fed, views or stateful."""

    def __init__(self, found: dict[str, Any], kind: str = "fed") -> None:
        self.entries, self.kind = found, kind
        self.calls: list[tuple[str, int, int]] = []
        self.opened: list[str] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.state = rows_of(np.zeros(0), 0)

    def opener(self, entry: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        self.opened.append(entry)
        return {"fed": Fed, "views": Views, "stateful": Stateful}[self.kind](self, entry)

    def step(self, entry: str, feeds: dict[str, np.ndarray], cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        specs = {spec["name"]: spec for spec in self.entries[entry]["inputs"]}
        given = {} if self.kind == "stateful" else {name: rows[None] for name, rows in cache.items()}
        for name, value in {**feeds, **given}.items():
            wanted = specs[name]
            assert value.dtype == wanted["dtype"], name
            low, high = next(((d[1], d[3]) for d in wanted.get("dynamic", [])), (None, None))
            assert value.shape[1:] == tuple(wanted["shape"][1:]) or low <= value.shape[1] <= high, (name, value.shape)
            assert np.isfinite(value).all()
        ids, position = feeds["ids"][0], int(feeds["position"][0])
        assert position + len(ids) <= CONTEXT, "positions that the model does not know"
        last = int(feeds["last"][0]) if "last" in feeds else len(ids) - 1
        new = rows_of(ids.astype(np.float64), position)
        assert min(len(rows) for rows in cache.values()) >= position
        whole = {name: np.concatenate([cache[name][:position], rows[: last + 1]]) for name, rows in new.items()}
        self.calls.append((entry, len(ids), len(cache["latent_0"])))
        self.feeds = feeds
        made = {f"new_{name}": rows[None].astype(specs[name]["dtype"]) for name, rows in new.items()}
        return {"logits": logits_of(whole)[None].astype(np.float32), **made}


class Fed:
    def __init__(self, model: Model, entry: str) -> None:
        self.model, self.entry = model, entry

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [row["name"] for row in CACHE]
        own = {name: value for name, value in feeds.items() if name not in names}
        made = self.model.step(self.entry, own, {name: feeds[name][0] for name in names})
        self.model.feeds = feeds
        return made


class Views(Fed):
    def __init__(self, model: Model, entry: str) -> None:
        super().__init__(model, entry)
        specs = {spec["name"]: spec for spec in model.entries[entry]["inputs"]}
        self.views = {row["name"]: np.zeros(specs[row["name"]]["shape"], "float32") for row in CACHE}

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert not set(feeds) & set(self.views)
        return self.model.step(self.entry, feeds, {name: view[0] for name, view in self.views.items()})


class Stateful(Fed):
    stateful = True

    def reset(self) -> None:
        self.model.state = rows_of(np.zeros(0), 0)

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert set(feeds) <= {"ids", "position", "last"}
        model, position = self.model, int(feeds["position"][0])
        assert len(model.state["latent_0"]) == position
        cache = {name: rows.astype(np.float32) for name, rows in model.state.items()}
        made = model.step(self.entry, feeds, cache)
        count = int(feeds["last"][0]) + 1 if "last" in feeds else feeds["ids"].shape[1]
        new = rows_of(feeds["ids"][0, :count].astype(np.float64), position)
        model.state = {name: np.concatenate([rows, new[name]]) for name, rows in model.state.items()}
        return {"logits": made["logits"]}


def session(shapes: dict[str, tuple[int, int, bool]], kind: str = "fed", **types: str) -> tuple[Session, Model]:
    model = Model(entries(shapes, **types), kind)
    return Session(DECODER, model.entries, model.opener), model


def tokens(count: int) -> list[int]:
    return [(7 * i * i + 3) % VOCABULARY for i in range(count)]


def test_it_is_python_3_9_with_the_standard_library_at_the_top() -> None:
    for name in ("generate", "prompt", "text"):
        tree = ast.parse(RUNNER.with_name(f"runner_{name}.py").read_text("utf-8"), feature_version=(3, 9))
        imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        known = {"argparse", "json", "math", "os", "random", "signal", "sys", "threading", "time"}
        assert imported <= {"__future__", "typing", *known}
        assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))


@pytest.mark.parametrize("kind", ["fed", "views", "stateful"])
@pytest.mark.parametrize("shapes", ALL.values(), ids=ALL)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_logits_are_those_of_all_tokens_however_they_come(
    shapes: dict[str, tuple[int, int, bool]], kind: str, data: st.DataObject
) -> None:
    if kind == "views" and any(dynamic for *_, dynamic in shapes.values()):
        return  # buffers that can be written have a fixed shape
    one, _ = session(shapes, kind)
    for _ in range(data.draw(st.integers(1, 2))):
        one.reset()
        ids: list[int] = []
        while len(ids) < CONTEXT and (parts := data.draw(st.integers(0, CONTEXT - len(ids)))):
            new = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=parts, max_size=parts))
            ids += new
            before = {name: rows.copy() for name, rows in one.rows.items()}
            np.testing.assert_allclose(one.feed(new), reference(ids), rtol=0, atol=1e-5)
            assert one.position == len(ids)
            if kind != "stateful":
                for name, rows in rows_of(np.array(ids), 0).items():
                    np.testing.assert_array_equal(one.rows[name][0, : len(ids)], rows)
                    assert (one.rows[name] == before[name])[0, len(ids) :].all(), "rows of padding were written"


def test_a_fault_of_the_cache_shows() -> None:
    one, _ = session(DYNAMIC)
    one.feed(tokens(9))
    one.rows["rope_0"][0, 4, 1] += 1
    assert np.abs(one.feed([1]) - reference([*tokens(9), 1])).max() > 1e-4


@pytest.mark.parametrize(
    ("shapes", "count", "wanted"),
    [
        (DYNAMIC, 1, ["decode"]),
        (DYNAMIC, 2, ["prefill_4"]),  # nothing is filled up
        (DYNAMIC, 37, ["prefill_16", "prefill_16", "prefill_16"]),
        (WHOLE, FEW, ["prefill_4"]),
        (WHOLE, 3, ["decode"] * 3),  # one by one is less than padding
        (WHOLE, FEW + 1, ["prefill_16"]),
        (WHOLE, 17, ["prefill_16", "decode"]),
        (BUCKETS, FEW, ["decode_8"] * FEW),
        (BUCKETS, FEW + 1, ["prefill_6_8"]),
        (BUCKETS, 12, ["prefill_6_8", "prefill_6_8"]),
        (BUCKETS, 20, ["prefill_6_8", "prefill_6_8", f"prefill_6_{CONTEXT}", "decode_48", "decode_48"]),
        (WITHOUT_PREFILL, 3, ["decode"] * 3),
    ],
)
def test_which_entry_takes_how_many(shapes: dict[str, tuple[int, int, bool]], count: int, wanted: list[str]) -> None:
    one, model = session(shapes)
    one.feed(tokens(count))
    assert [name for name, *_ in model.calls] == wanted
    prepared, ahead = session(shapes)
    prepared.prepare(count)
    assert ahead.calls == []
    assert set(ahead.opened) >= set(model.opened)
    prepared.feed(tokens(count))
    prepared.feed([1])
    assert ahead.opened == list(dict.fromkeys(ahead.opened)), "opened twice"
    assert {name for name, *_ in ahead.calls} == set(ahead.opened), "opened and not needed, or the other way"


def test_near_the_end_of_the_context_nothing_is_filled_up_beyond_it() -> None:
    one, model = session(WHOLE)
    one.feed(tokens(CONTEXT - 6))
    model.calls.clear()
    one.feed(tokens(6))
    assert [name for name, *_ in model.calls] == ["prefill_4", "decode", "decode"]
    assert one.position == CONTEXT


@pytest.mark.parametrize("kind", ["fed", "stateful"])
def test_a_full_context_takes_nothing(kind: str) -> None:
    one, model = session(DYNAMIC, kind)
    one.feed(tokens(CONTEXT - 2))
    before = {name: rows.copy() for name, rows in one.rows.items()}
    model.calls.clear()
    with pytest.raises(Full, match=f"{CONTEXT - 2} \\+ 3 tokens are more than the context of {CONTEXT}"):
        one.feed([1, 2, 3])
    assert model.calls == []
    assert one.position == CONTEXT - 2
    assert all((one.rows[name] == rows).all() for name, rows in before.items())
    np.testing.assert_allclose(one.feed([1, 2]), reference([*tokens(CONTEXT - 2), 1, 2]), rtol=0, atol=1e-5)
    with pytest.raises(Full):
        one.feed([0])
    one.prepare(0)  # nothing is left to be opened


def test_rows_are_handed_over_without_a_copy() -> None:
    one, model = session(DYNAMIC)
    one.feed(tokens(20))
    one.feed([1])
    for row in CACHE:
        fed = model.feeds[row["name"]]
        assert np.shares_memory(fed, one.rows[row["name"]])
        assert fed.shape == (1, 20, row["width"])  # what is filled, and no more
        assert fed.flags.c_contiguous


def test_the_cache_and_tokens_have_the_entries_own_types() -> None:
    one, model = session(DYNAMIC, dtype="float16", ids="int32")
    one.feed(tokens(5))
    assert one.feed([1]).dtype == np.float32
    assert {rows.dtype for rows in one.rows.values()} == {np.dtype("float16")}
    assert one.cache_bytes == CONTEXT * (3 + 2) * 2
    assert model.feeds["ids"].dtype == model.feeds["position"].dtype == np.int32


def test_a_runtime_that_keeps_the_cache_is_given_none() -> None:
    one, model = session(DYNAMIC, "stateful")
    one.prepare(3)
    assert one.cache_bytes == 0
    one.feed(tokens(3))
    assert not any(rows.any() for rows in one.rows.values())
    one.reset()
    assert len(model.state["latent_0"]) == 0


def test_views_are_written_where_they_lag_behind_alone() -> None:
    one, model = session(BUCKETS, "views")
    runs: dict[str, Views] = {}
    opener = model.opener
    one._opener = lambda name: runs.setdefault(name, opener(name))
    one.feed(tokens(8))  # prefill_6_8, decode_8 twice
    runs["decode_8"].views["latent_0"][0, 2] = 99  # a row that is there already is not written again
    wrong = one.feed([1])
    assert one.position == 9
    assert np.abs(wrong - reference([*tokens(8), 1])).max() > 1e-4
    one.reset()
    np.testing.assert_allclose(one.feed(tokens(8)), reference(tokens(8)), rtol=0, atol=1e-5)


def test_onnx_runtime_reads_the_cache_where_it_lies() -> None:
    ort, helper, float32 = pytest.importorskip("onnxruntime"), onnx.helper, onnx.TensorProto.FLOAT
    first = helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["rows", "first"], ["row"], axis=1)],
        "main",
        [helper.make_tensor_value_info("rows", float32, [1, "P", 512])],
        [helper.make_tensor_value_info("row", float32, [1, 1, 512])],
        [first],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.ones((1, 65_536, 512), np.float32)

    def milliseconds(run: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3

    view = rows[:, :65_000]
    copied = min(milliseconds(view.copy) for _ in range(3))
    assert min(milliseconds(lambda: session.run(None, {"rows": view})) for _ in range(20)) < copied / 10
