"""``edgeattn sparsity``: what it shows and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeattn.models.sparsity import Reader, Site
from edgeattn.pipeline.sparsity import Sparsity
from edgeattn.report.sparsity import BARS, page, picture, worth

Cli = Callable[..., subprocess.CompletedProcess[str]]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
PLM = ["edgeattn.models.plm:plm", "-i", "ids=1x8:int64:0..63", *(f"-a{name}={value}" for name, value in SIZES.items())]

RELU = Site("model.layers.0.mlp.act", 0.9, 0.8, 0.95, 1000, 10, 100, 5)


def test_held_out_samples(edgeattn_cli: Cli, tmp_path: Path) -> None:
    done = edgeattn_cli("sparsity", "fmvit-digits", "--on", "5", "--json", "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["data"], found["unit"], found["random"]) == ("5 held-out samples", "inputs", False)
    assert [site["path"] for site in found["sites"][:2]] == ["stem.1", "stem.3"]
    assert all(0.2 < site["low"] <= site["zeros"] <= site["high"] < 0.9 for site in found["sites"])
    assert found["weights"] is None
    assert "ceiling" not in found
    text = (tmp_path / "page.html").read_text()
    assert "stages.3.1.ffn.act" in text
    assert "weights are random" not in text


@pytest.mark.slow
def test_a_decoder_of_random_weights_on_random_tokens(edgeattn_cli: Cli, tmp_path: Path) -> None:
    done = edgeattn_cli("sparsity", *PLM, "--on", "100", "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weights are random" in done.stdout
    assert "100 random tokens" in done.stdout
    assert "model.layers.1.mlp.act" in done.stdout
    assert re.search(r"a decoded token reads \d\d\.\d%", done.stdout.replace("\n", " "))
    assert "The weights are random" in (tmp_path / "page.html").read_text()
    found = json.loads(edgeattn_cli("sparsity", *PLM, "--on", "100", "--json").stdout)
    assert {site["rows"] for site in found["sites"]} == {100}
    assert found["ceiling"] == pytest.approx(1 / found["read"])
    assert f"{found['read']:.1%}" in done.stdout


@pytest.mark.slow
def test_the_recipes_text_is_read(edgeattn_cli: Cli, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(60)]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(words * 2))
    sizes = "\n".join(f"{name} = {value}" for name, value in SIZES.items())
    (tmp_path / "own.toml").write_text(
        f'name = "own"\n[model]\nfactory = "edgeattn.models.plm:plm"\n[model.args]\n{sizes}\n'
        '[inputs.ids]\nshape = [1, 8]\ndtype = "int64"\nlow = 0\nhigh = 63\n'
        '[decoder]\ncontext = 64\nprefill = [8]\ntext = "text.txt"\ntokenizer = "."\n'
    )
    found = json.loads(edgeattn_cli("sparsity", "own.toml", "--json", cwd=tmp_path).stdout)
    assert found["data"] == "120 tokens of held-out text"
    assert found["sites"][0]["rows"] == 120
    (tmp_path / "text.txt").write_text("")
    empty = edgeattn_cli("sparsity", "own.toml", cwd=tmp_path)
    assert empty.returncode == 2
    assert "the held-out text is empty" in empty.stderr


GUESTS = """
from torch import nn

def two():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 2))

def none():
    return nn.Sequential(nn.Linear(4, 4), nn.GELU())
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["net.py:none", "-i", "x=1x4"], "the model has no ReLU"),
        (["net.py:two", "-i", "x=1x5"], "the model cannot be run"),
        (["net.py:two", "-i", "x=1x4", "-o", "page.svg"], "--output page.html"),
        (["net.py:two", "-i", "x=1x4", "-o", "/proc/none/page.html"], "cannot be written"),
        (["net.py:two", "-i", "x=1x4", "--on", "0"], "--on"),
        (["fmvit-digit"], "fmvit-digits"),
    ],
)
def test_what_is_refused(edgeattn_cli: Cli, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "net.py").write_text(GUESTS)
    done = edgeattn_cli("sparsity", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("page*"))


def test_a_guest_on_random_inputs(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(GUESTS)
    done = edgeattn_cli("sparsity", "net.py:two", "-i", "x=3x4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 random inputs" in done.stdout
    assert "decoded token" not in done.stdout


def of(sites: list[Site], readers: list[Reader], weights: int | None, random: bool = False) -> Sparsity:
    return Sparsity("a < b", random, "9 tokens of <text>", "tokens", sites, readers, weights)


def test_what_it_is_worth_at_the_published_sparsity_of_plm() -> None:
    """90.9 % of zeros, at PLM-1.8B's sizes: 73.3 % of the weights are read, at most 1.36 times as fast."""
    readers = [Reader(f"model.layers.{i}.mlp.down_proj", 8192 * 2048, 0.909) for i in range(32)]
    found = of([RELU], readers, 1_825_458_176 - 149_504)
    assert found.read == pytest.approx(0.733, abs=5e-4)
    assert found.as_dict()["ceiling"] == pytest.approx(1.36, abs=5e-3)
    assert "73.3% of the 1,825,308,672" in worth(found)
    assert worth(of([RELU], [], None)) == ""


def test_the_page_escapes_names_and_cuts_long_pictures() -> None:
    sites = [RELU, *(Site(f"<b>{i}&", 0.5, 0.5, 0.5, 10, 10, 1, 0) for i in range(BARS))]
    found = of(sites, [], 10, random=True)
    root = ElementTree.fromstring(picture(found))
    texts = [element.text for element in root.iter() if element.text]
    assert "<b>1&" in texts
    assert f"<b>{BARS - 1}&" not in texts
    assert "units that are zero at every token" in texts
    text = page(found)
    assert f"<td>&lt;b&gt;{BARS - 1}&amp;</td>" in text
    assert f"the first {BARS} of {BARS + 1}" in text
    assert "9 tokens of &lt;text&gt;" in text
    assert "<b>" not in text
    assert "The weights are random" in text
    assert found.zeros == pytest.approx((900 + 5 * BARS) / (1000 + 10 * BARS))
