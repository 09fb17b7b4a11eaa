"""Text from a decoder's bundle: ``edgeattn generate``, and ``run.py`` as a device has it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.bundle.manifest import DecoderInfo
from edgeattn.models.build import build
from edgeattn.pipeline.export import make_job
from tests.conftest import ROOT

PLM_TINY = ROOT / "recipes" / "checkpoints" / "plm-tiny"
CONTEXT, VOCABULARY = 1024, 2080  # the tokenizer has 2048: the others are padding, as PLM's own are

#: Weights large enough for attention to tell tokens apart.
NET = """
import torch
from edgeattn.models.plm import plm

def make():
    model = plm(
        vocab_size=2080, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, intermediate_size=64, max_position_embeddings=1024,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model
"""
RECIPE = f"""
name = "plm-small"
[model]
factory = "net.py:make"
[inputs.ids]
shape = [1, 16]
dtype = "int64"
low = 0
high = 2047
[decoder]
context = {CONTEXT}
prefill = [8, 32]
tokenizer = "{PLM_TINY}"
steps = 16
greedy = 4
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plm-small")
    (folder / "net.py").write_text(NET)
    (folder / "plm-small.toml").write_text(RECIPE)
    return folder / "plm-small.toml"


@pytest.fixture(scope="module")
def small(recipe: Path, home: Path) -> Bundle:
    return edgeattn.export(str(recipe), target="onnx", output=home / "text")


@pytest.fixture(scope="module")
def without_tokenizer(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, as it is made where no tokenizer is known."""
    copy = Path(shutil.copytree(small.path, tmp_path_factory.mktemp("bare") / "bare"))
    bare = {"decoder": DecoderInfo(**small.manifest.decoder.model_dump(include={"context", "vocabulary", "cache"}))}
    (copy / "manifest.json").write_text(small.manifest.model_copy(update=bare).sealed().text())
    return Bundle.open(copy)


Words = Sequence[object]


def edgeattn_words(bundle: Bundle, *words: object) -> list[str]:
    return [sys.executable, "-m", "edgeattn", "generate", str(bundle.path), *map(str, words)]


def runner_words(bundle: Bundle, *words: object) -> list[str]:
    return [sys.executable, str(bundle.path / "run.py"), *map(str, words)]


BOTH = pytest.mark.parametrize("words", [edgeattn_words, runner_words], ids=["edgeattn", "run.py"])


def run(words: Sequence[str], sent: bytes = b"", block: Path | None = None, **environ: str) -> Any:
    """A process of its own; with ``block`` that folder's sitecustomize.py is run first."""
    environ = {**os.environ, **environ, **({"PYTHONPATH": f"{block}:{ROOT}"} if block else {})}
    return subprocess.run(words, input=sent, capture_output=True, timeout=300, env=environ, check=False)


def answer(words: Sequence[str], sent: bytes = b"") -> dict[str, Any]:
    done = run([*words, "--json"], sent)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def failed(done: Any, code: int, *said: str) -> None:
    assert done.returncode == code, done
    assert done.stdout.strip() == b"", "something was made"
    assert b"Traceback" not in done.stderr
    for word in said:
        assert word in done.stderr.decode()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PLM_TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def greedy(recipe: Path) -> Callable[[list[int], int], list[int]]:
    """Argmax after argmax by PyTorch's own forward of all tokens anew."""
    torch.manual_seed(0)
    model = build(make_job(str(recipe), target="onnx").resolved).model

    def continued(ids: list[int], count: int) -> list[int]:
        made = list(ids)
        with torch.no_grad():
            for _ in range(count):
                made.append(int(model(torch.tensor([made]))[0, -1].argmax()))
        return made[len(ids) :]

    return continued


@BOTH
def test_the_most_likely_tokens_are_pytorchs(small: Bundle, greedy: Any, words: Any) -> None:
    ids = [(37 * i * i + 5) % 2048 for i in range(45)]  # 32, 8, 4 and 1
    result = answer(words(small, "--ids", ",".join(map(str, ids)), "--max-tokens", 24))
    assert result["ids"] == greedy(ids, 24)
    assert (result["finish"], result["tokens"], result["prompt_tokens"], result["cached"]) == ("length", 24, 45, 68)
    assert result["cache_bytes"] == CONTEXT * 2 * (32 + 16) * 4
    assert result["peak_rss_mb"] > 20
    for name in ("load_ms", "first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert result[name] > 0
    assert result["first_token_ms"] < 1000 * 45 / result["prefill_tokens_per_s"] + 1000


@BOTH
def test_the_text_alone_goes_to_standard_output(small: Bundle, tokenizer: Tokenizer, words: Any) -> None:
    asked = words(small, "--prompt", "Ein Gruß: ", "--max-tokens", 30)
    result = answer(asked)
    assert result["prompt_tokens"] == len(tokenizer.encode("Ein Gruß: ").ids)
    known = [token for token in result["ids"] if token < 2048]
    if known == result["ids"]:
        assert result["text"] == tokenizer.decode(known)
    done = run(asked, PYTHONIOENCODING="latin-1")
    assert done.stdout == f"{result['text']}\n".encode()
    said = done.stderr.decode().splitlines()
    assert [line.split(" ")[0] for line in said] == ["prompt", "cache", "ended:", "the"]
    assert "30 tokens are --max-tokens" in said[2]
    assert said[3] == "the weights are random: the text means nothing"


@BOTH
def test_a_prompt_from_standard_input(small: Bundle, words: Any) -> None:
    wanted = answer(words(small, "--prompt", "déf f(", "--max-tokens", 6))["ids"]
    asked = words(small, "--prompt", "-", "--max-tokens", 6)
    assert answer(asked, "de\u0301f f(\n".encode())["ids"] == wanted  # composed by the tokenizer
    if words is edgeattn_words:
        assert answer(words(small, "--max-tokens", 6), "déf f(".encode())["ids"] == wanted
    failed(run(asked, b"\xff"), 2, "not UTF-8")


def test_chats_and_seeds_are_the_same_here_and_on_a_device(small: Bundle, tokenizer: Tokenizer) -> None:
    chat = ("--chat", "--prompt", "What is len?", "--system", "Be short.")
    drawn = ("--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--max-tokens", 20)
    here = answer(edgeattn_words(small, *chat, *drawn, "--seed", 3))
    there = answer(runner_words(small, *chat, *drawn, "--seed", 3))
    same = ("ids", "text", "finish", "prompt_tokens", "seed", "temperature", "top_k", "top_p")
    assert {name: here[name] for name in same} == {name: there[name] for name in same}
    turns = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is len?<|im_end|>\n<|im_start|>assistant\n"
    assert here["prompt_tokens"] == len(tokenizer.encode(turns, add_special_tokens=False).ids)
    free = [answer(edgeattn_words(small, *chat, *drawn)) for _ in range(2)]
    assert free[0]["seed"] != free[1]["seed"]
    again = answer(edgeattn_words(small, *chat, *drawn, "--seed", free[0]["seed"]))
    assert again["ids"] == free[0]["ids"]


@BOTH
def test_padding_tokens_show_as_numbers_and_half_characters_not_at_all(small: Bundle, words: Any) -> None:
    asked = words(small, "--prompt", "x", "--temperature", 1e6, "--seed", 1, "--max-tokens", 400)
    result = answer(asked)
    padding = [token for token in result["ids"] if token >= 2048]
    assert padding
    for token in padding:
        assert f"<|id {token}|>" in result["text"]
    assert run(asked).stdout.decode() == f"{result['text']}\n"


@BOTH
def test_stop_tokens(small: Bundle, words: Any) -> None:
    whole = answer(words(small, "--ids", "9,8,7", "--max-tokens", 12))["ids"]
    stop = next(token for token in whole[2:] if token not in whole[:2])
    result = answer(words(small, "--ids", "9,8,7", "--max-tokens", 12, "--stop", 2079, "--stop", stop))
    assert result["ids"] == whole[: whole.index(stop)]
    assert (result["finish"], result["stopped_by"]) == ("stop", stop)
    assert small.manifest.decoder is not None
    assert small.manifest.decoder.stop == (2045, 2047)


@BOTH
def test_a_full_context_ends_the_text(small: Bundle, words: Any) -> None:
    ids = ",".join(str(i % 2048) for i in range(CONTEXT - 3))
    done = run(words(small, "--ids", ids))
    assert done.returncode == 0
    assert len(done.stdout.decode().split(",")) == 4
    assert f"the context of {CONTEXT} tokens is full" in done.stderr.decode()
    assert f"{CONTEXT} of {CONTEXT} tokens in it" in done.stderr.decode()
    failed(run(words(small, "--ids", ids + ",1,2,3,4")), 2, f"{CONTEXT + 1} tokens", f"the context is {CONTEXT}")


@BOTH
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--ids", "1,2080"), "no such token"),
        (("--prompt", "x", "--top-p", 2), "--top-p cannot be used"),
        (("--prompt", "x", "--max-tokens", "x"), "--max-tokens"),
        (("--prompt", "x", "--system", "y"), "a part of a chat"),
        (("--prompt", b"\xff".decode("utf-8", "surrogateescape")), "no Unicode text"),
        (("--prompt", "x", "--backend", "coreml"), "coreml"),
    ],
)
def test_what_is_refused_makes_nothing(small: Bundle, words: Any, given: Words, said: str) -> None:
    failed(run(words(small, *given)), 2, said)


def test_what_edgeattn_alone_refuses(small: Bundle, digits: Bundle) -> None:
    failed(run(edgeattn_words(digits, "--prompt", "x")), 2, "the bundle makes no tokens")
    failed(run(edgeattn_words(small, "--prompt", "x", "--threads", 2)), 2, "--threads is for a device")
    failed(run(edgeattn_words(small, "--prompt", "x", "--ids", "1")), 2, "two prompts")
    failed(run(runner_words(small, "--prompt", "x", "--ids", "1")), 2, "not allowed with")
    failed(run(runner_words(digits, "--prompt", "x")), 2, "unrecognized")


@BOTH
def test_without_a_tokenizer_there_are_numbers(without_tokenizer: Bundle, small: Bundle, words: Any) -> None:
    failed(run(words(without_tokenizer, "--prompt", "x")), 2, "no tokenizer", "--ids 1,2,3")
    asked = ("--ids", "4, 5", "--max-tokens", 5)
    result = answer(words(without_tokenizer, *asked))
    assert result["text"] is None
    done = run(words(without_tokenizer, *asked))
    assert done.stdout.decode() == ",".join(map(str, result["ids"])) + "\n"
    assert answer(words(small, *asked))["ids"] == result["ids"]  # and where there is one


@BOTH
def test_packages_that_are_missing(small: Bundle, words: Any, tmp_path: Path) -> None:
    def block(*names: str) -> Path:
        lines = [f"sys.modules[{name!r}] = None" for name in names]
        (tmp_path / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
        return tmp_path

    line = {edgeattn_words: "pip install 'edgeattn[text]'"}
    asked = words(small, "--prompt", "x", "--max-tokens", 2)
    lacking = run(asked, block=block("tokenizers"))
    failed(lacking, 3, "tokenizers is not installed", line.get(words, "python3 -m pip install tokenizers"))
    assert run(words(small, "--ids", "1", "--max-tokens", 2), block=block("tokenizers", "jinja2")).returncode == 0
    lacking = run([*asked, "--chat"], block=block("jinja2"))
    failed(lacking, 3, "jinja2 is not installed", line.get(words, "python3 -m pip install tokenizers jinja2"))
    assert run(asked, block=block("jinja2", "torch")).returncode == 0


@BOTH
def test_ctrl_c_leaves_what_was_made(small: Bundle, words: Any) -> None:
    asked = words(small, "--prompt", "x", "--max-tokens", 1000)
    whole = run(asked).stdout
    process = subprocess.Popen(asked, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    text = (begun + rest).decode()
    assert b"Traceback" not in errors
    if process.returncode == 0:
        pytest.skip("this machine made all tokens before the signal came")
    assert process.returncode == 130, errors
    assert text.endswith("\n")
    assert whole.decode().startswith(text[:-1].rstrip("\ufffd"))
    assert b"ended: by Ctrl-C" in errors


@BOTH
def test_a_reader_that_goes_ends_it_quietly(small: Bundle, words: Any) -> None:
    process = subprocess.Popen(
        words(small, "--prompt", "x", "--max-tokens", 1000), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode in (141, -signal.SIGPIPE)


def test_a_runtime_that_computes_something_else_makes_no_text(small: Bundle, tmp_path: Path) -> None:
    fake = tmp_path / "fake" / "onnxruntime"
    fake.mkdir(parents=True)
    fake.joinpath("__init__.py").write_text(
        "import numpy\n__version__ = '0.0'\nSessionOptions = type('SessionOptions', (), {})\n"
        "class InferenceSession:\n    def __init__(self, *a, **k): pass\n"
        "    def run(self, names, feeds): return [numpy.ones((1, 2080), 'float32') for _ in names]\n"
    )
    cache = {"PYTHONPATH": str(fake.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    failed(run(runner_words(small, "--prompt", "x"), **cache), 1, "refused: onnxruntime 0.0 computes")


def test_all_entries_of_a_file_share_one_session(small: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import onnxruntime, sys\nmake = onnxruntime.InferenceSession\n"
        "def noted(*a, **k):\n    print('SESSION', file=sys.stderr)\n    return make(*a, **k)\n"
        "onnxruntime.InferenceSession = noted\n"
    )
    for words in (edgeattn_words, runner_words):
        asked = words(small, "--ids", ",".join("5" * 41), "--max-tokens", 3)
        assert run(asked).returncode == 0  # the golden samples are compared in this one
        assert run(asked, block=tmp_path).stderr.decode().count("SESSION") == 1


def test_on_a_device_the_same_text_is_made(small: Bundle) -> None:
    asked = ("--prompt", "-f(x)\n'\"", "--max-tokens", 8, "--temperature", 0.9, "--seed", 5, "--stop", 2000)
    here, there = run(edgeattn_words(small, *asked)), run(edgeattn_words(small, *asked, "--device", "local"))
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert "tokens/s" in there.stderr.decode()
    result = answer(edgeattn_words(small, *asked, "--device", "local", "--threads", 1))
    assert (result["device"], result["emulated"], result["threads"]) == ("local", False, 1)
    failed(run(edgeattn_words(small, "--prompt", "", "--device", "local")), 2, "the prompt is empty")


def test_what_other_commands_make_of_a_decoder(small: Bundle, recipe: Path, edgeattn_cli: Any, tmp_path: Path) -> None:
    done = edgeattn_cli("export", recipe, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("perplexity", "random tokens", "ratio", "KL", "top-1 agreement", "drift", "4 of 4 tokens", "cache"):
        assert words in done.stdout
    following = [line.partition("    (")[0].strip() for line in done.stdout.partition("next:")[2].splitlines()[1:]]
    assert [shlex.split(line)[1] for line in following[:4]] == ["verify", "generate", "profile", "inspect"]
    assert following[5].endswith('run.py --prompt "..."')
    for line in following:
        program, *rest = shlex.split(line)
        words = [sys.executable, *(["-m", "edgeattn"] if program == "edgeattn" else []), *rest]
        shown = run(words)
        assert shown.returncode == 0, (line, shown.stderr)
    inspected = edgeattn_cli("inspect", small.path).stdout
    for words in ("context 1024; vocabulary 2080; tokenizer tokenizer.json, borrowed", "perplexity", "greedy"):
        assert words in " ".join(inspected.split())
    profiled = json.loads(run(runner_words(small, "--profile", "--runs", "2", "--warmup", "1", "--json")).stdout)
    assert profiled["timed"].startswith("one run of decode, ")
    named = run(runner_words(small, "--profile", "--entry", "prefill_32", "--runs", "1", "--warmup", "0"))
    assert b"one run of prefill_32" in named.stdout


def test_layers_of_a_cache_are_shown_together() -> None:
    from edgeattn.cli._show import families, worst_rows

    names = ["ids", *(f"{kind}_{i}" for i in range(3) for kind in ("latent", "rope")), "fc_1", "fc_2", "x2"]
    found = families(names)
    assert [label for label, _ in found] == ["ids", "latent_0..2", "rope_0..2", "fc_1", "fc_2", "x2"]
    assert [name for _, members in found for name in members] == [*names[:1], *sorted(names[1:7]), *names[7:]]
    rows = [("a", f"row_{i}", f"{e:.2e}", "", "", "", "0") for i, e in enumerate((1e-7, 3e-5, 2e-6))]
    assert worst_rows([*rows, ("b", "row_0", "1.00e+00", "", "", "", "0")]) == [
        ("a", "worst of row_0..2", "3.00e-05", "", "", "", "0"),
        ("b", "row_0", "1.00e+00", "", "", "", "0"),
    ]
