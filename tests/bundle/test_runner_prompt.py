"""What is asked for, how a token is chosen, and how a text ends."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from edgeattn.bundle.runner_prompt import Choice, Request, figures, generate, tokens_of
from edgeattn.bundle.runner_text import Numbers, Pieces, Refused

DECODER: dict[str, Any] = {"context": 8, "vocabulary": 5, "stop": (4,), "tokenizer": "", "chat_template": ""}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: what runs in the background is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def request(**given: Any) -> Request:
    return Request(None, "1,2", **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "there is no prompt"),
        ({"prompt": "x", "ids": "1"}, "two prompts"),
        ({"ids": "1", "chat": True}, "take a text"),
        ({"ids": "1", "system": ""}, "take a text"),
        ({"prompt": "x", "system": "y"}, "part of a chat"),
        ({"ids": "1,x"}, "token numbers: 'x'"),
        ({"ids": "1,,2"}, "token numbers: ''"),
        ({"ids": "-1"}, "token numbers: '-1'"),
        ({"ids": "1 2"}, "token numbers: '1 2'"),
        ({"ids": "²"}, "token numbers: '²'"),
        ({"prompt": "x", "most": 0}, "--max-tokens is too small: 0"),
        ({"prompt": "x", "temperature": -0.1}, "--temperature cannot be used: -0.1"),
        ({"prompt": "x", "temperature": float("nan")}, "--temperature cannot be used: nan"),
        ({"prompt": "x", "temperature": float("inf")}, "--temperature cannot be used: inf"),
        ({"prompt": "x", "temperature": 0.0, "top_k": 3}, "nothing is drawn at --temperature 0"),
        ({"prompt": "x", "top_k": 0}, "--top-k is too small: 0"),
        ({"prompt": "x", "top_p": 0.0}, "--top-p cannot be used: 0"),
        ({"prompt": "x", "top_p": 1.01}, "--top-p cannot be used: 1.01"),
        ({"prompt": "x", "top_p": float("nan")}, "--top-p cannot be used: nan"),
        ({"prompt": "x", "seed": -1}, "--seed is negative: -1"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        Request(given.pop("prompt", None), given.pop("ids", None), **given)
    assert caught.value.code == 2


def test_what_is_taken_where_nothing_is_said() -> None:
    plain = request()
    assert (plain.most, plain.temperature, plain.top_k, plain.top_p, plain.ids) == (256, 0.0, None, None, [1, 2])
    assert request(top_k=3).temperature == request(top_p=0.5).temperature == 1.0
    assert request(top_k=3, temperature=0.3).temperature == 0.3
    assert len({request().seed for _ in range(8)}) > 1
    assert Request(None, " 1, 2 ").ids == [1, 2]


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"prompt": "x"}, "no tokenizer"),
        ({}, {"ids": ""}, "the prompt is empty"),
        ({}, {"ids": "1,5"}, "no such token: 5; it has 0 to 4"),
        ({}, {"ids": "1", "stop": (5,)}, "no such token: 5"),
        ({}, {"ids": "1", "stop": (-1,)}, "no such token: -1"),
        ({}, {"ids": ",".join("1" * 9)}, "longer than the context: 9 tokens; the context is 8 tokens"),
        ({"tokenizer": "tokenizer.json"}, {"prompt": ""}, "the prompt is empty"),
        ({"tokenizer": "tokenizer.json"}, {"prompt": "x", "chat": True}, "no chat template"),
    ],
)
def test_prompts_that_the_model_cannot_take(changes: dict[str, Any], given: dict[str, Any], words: str) -> None:
    asked = Request(given.pop("prompt", None), given.pop("ids", None), **given)
    with pytest.raises(Refused, match=words) as caught:
        tokens_of({**DECODER, **changes}, asked, lambda name: name)
    assert caught.value.code == 2


def test_a_prompt_as_long_as_the_context_is_taken() -> None:
    ids, shown = tokens_of(DECODER, Request(None, ",".join("1" * 8)), lambda name: name)
    assert len(ids) == 8
    assert isinstance(shown, Numbers)


def test_a_token_that_begins_texts_is_the_templates_own_in_chats(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="b"))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    decoder = {**DECODER, "tokenizer": "tokenizer.json", "special_tokens": {}, "chat_template": "a"}
    for asked, wanted in ((Request("a"), [0, 1]), (Request("b", chat=True), [1])):
        ids, shown = tokens_of(decoder, asked, lambda name: str(tmp_path / name))
        assert ids == wanted
        assert isinstance(shown, Pieces)


LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def drawn(logits: np.ndarray = LOGITS, count: int = 4000, **given: Any) -> Counter[int]:
    choose = Choice(request(seed=0, **given))
    return Counter(choose(logits) for _ in range(count))


def shares(found: Counter[int], vocabulary: int = 5) -> list[float]:
    return [found[token] / found.total() for token in range(vocabulary)]


def test_the_most_likely_token_and_of_equals_the_first() -> None:
    choose = Choice(request())
    assert choose(LOGITS) == 1
    assert choose(np.array([0, 2, 2], np.float32)) == 1
    assert choose(np.array([-np.inf, -1, -np.inf], np.float32)) == 1


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    np.testing.assert_allclose(shares(drawn(temperature=1.0)), np.exp(LOGITS), atol=0.03)
    np.testing.assert_allclose(shares(drawn(temperature=1.0, top_k=99, top_p=1.0)), np.exp(LOGITS), atol=0.03)
    twice = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(shares(drawn(temperature=0.5)), twice, atol=0.03)


def test_top_k_and_top_p_draw_from_the_right_tokens() -> None:
    np.testing.assert_allclose(shares(drawn(top_k=2)), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)
    assert set(drawn(top_k=1)) == {1}
    np.testing.assert_allclose(shares(drawn(top_p=0.65)), [0, 4 / 7, 0, 3 / 7, 0], atol=0.03)
    assert set(drawn(top_p=0.75)) == {1, 3, 4}  # the token that reaches the share is among them
    assert set(drawn(top_p=1e-9)) == {1}
    assert set(drawn(top_k=3, top_p=0.8)) == {1, 3}  # 0.4 and 0.3 are 0.82 of the three
    assert set(drawn(np.zeros(5, np.float32), top_k=2)) < set(range(5))


def test_temperatures_that_overflow() -> None:
    assert set(drawn(temperature=1e-300, count=50)) == {1}
    assert len(drawn(temperature=1e300)) == 5
    assert set(drawn(np.array([-3e38, 3e38], np.float32), temperature=1.0, count=50)) == {1}


def test_the_same_seed_draws_the_same_and_another_something_else() -> None:
    def draws(seed: int) -> list[int]:
        choose = Choice(request(temperature=1.0, seed=seed))
        return [choose(LOGITS) for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)
    # 0.134, 0.847, 0.764, 0.255, ...: on every machine, as Python promises of random.Random.
    assert draws(1)[:8] == [1, 3, 3, 1, 1, 1, 3, 3]


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad: list[float], temperature: float) -> None:
    with pytest.raises(Refused, match="not finite") as caught:
        Choice(request(temperature=temperature))(np.array(bad, np.float32))
    assert caught.value.code == 1


class Counting:
    """A sequence whose next token is always the last one plus 1, modulo 4; or as ``then`` says."""

    context, cache_bytes = 8, 640

    def __init__(self, then: dict[int, int] | None = None) -> None:
        self.position, self.fed, self.then = 0, list[int](), then or {}
        self.on_feed = lambda: None

    def prepare(self, count: int) -> None:
        pass

    def feed(self, ids: list[int], each: Any = lambda: None) -> np.ndarray:
        for token in ids:
            self.fed.append(token)
            self.position += 1
            assert self.position <= self.context
            self.on_feed()
            each()
        logits = np.zeros(5, np.float32)
        logits[self.then.get(ids[-1], (ids[-1] + 1) % 4)] = 1
        return logits


class Letters:
    """A tokenizer of one letter a token."""

    def id_to_token(self, token: int) -> str:
        return "abcde"[token]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcde"[token] for token in ids)


def made(one: Counting, text: bool = False, ids: tuple[int, ...] = (1, 2), **given: Any) -> tuple[dict[str, Any], str]:
    written: list[str] = []
    shown = Pieces(Letters()) if text else Numbers()
    result = generate(one, DECODER, request(**given), (list(ids), shown), written.append)
    return result, "".join(written)


def test_a_text_ends_with_the_last_token_that_is_wanted() -> None:
    one = Counting()
    result, written = made(one, most=3)
    assert (result["ids"], result["finish"], written) == ([3, 0, 1], "length", "3,0,1")
    assert one.fed == [1, 2, 3, 0]  # the last token is not computed with
    assert (result["text"], result["cached"], result["tokens"], result["prompt_tokens"]) == (None, 4, 3, 2)


def test_a_text_ends_at_a_stop_token_that_is_not_shown() -> None:
    result, written = made(Counting({0: 4}), text=True)
    assert (result["text"], written, result["finish"], result["stopped_by"]) == ("da", "da", "stop", 4)
    result, _ = made(Counting(), text=True, stop=(1,))
    assert (result["text"], result["stopped_by"], result["ids"]) == ("da", 1, [3, 0])
    result, written = made(Counting({2: 4}), text=True)  # at once
    assert (result["tokens"], written, result["decode_tokens_per_s"]) == (0, "", None)


def test_a_text_ends_where_the_context_is_full() -> None:
    one = Counting()
    result, _ = made(one)
    assert result["finish"] == "context"
    assert result["ids"] == [3, 0, 1, 2, 3, 0, 1]  # the last of them needs no room
    assert (one.position, result["cached"]) == (8, 8)
    one = Counting()
    result, _ = made(one, ids=(0,) * 8)
    assert (result["ids"], result["finish"]) == ([1], "context")


def test_figures_of_a_text() -> None:
    result, _ = made(Counting(), most=3)
    assert result["first_token_ms"] > 0
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    lines = figures({**result, "peak_rss_mb": 12.3}, True)
    assert lines[0].startswith("prompt 2 tokens, ")
    assert "; new 3 tokens, " in lines[0]
    assert ", the first after " in lines[0]
    assert lines[0].endswith("; the most likely token each time")
    assert lines[1:] == [
        "cache 0.00 MB, 4 of 8 tokens in it; peak memory 12 MB",
        "ended: 3 tokens are --max-tokens",
        "the weights are random: the text means nothing",
    ]
    assert figures(result, False, timed=False)[0] == "prompt 2 tokens; new 3 tokens; the most likely token each time"
    result, _ = made(Counting(), temperature=0.5, top_k=2, seed=3)
    assert figures(result, False)[0].endswith("; temperature 0.5, top-k 2, seed 3")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_what_was_made() -> None:
    one = Counting()
    one.on_feed = lambda: interrupt() if one.position == 5 else None
    result, written = made(one, text=True)
    assert (result["finish"], result["text"], written) == ("interrupted", "dab", "dab")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_middle_of_a_prompt() -> None:
    one = Counting()
    one.on_feed = lambda: interrupt() if one.position == 1 else None
    result, written = made(one, text=True)
    assert (result["finish"], result["text"], written, one.fed) == ("interrupted", "", "", [1])
    assert result["first_token_ms"] is None


def test_a_second_ctrl_c_ends_everything() -> None:
    one = Counting()
    one.on_feed = lambda: (interrupt(), interrupt()) if one.position == 4 else None
    with pytest.raises(KeyboardInterrupt):
        made(one, text=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_and_where_ctrl_c_is_off_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(made(Counting(), most=2)))
    thread.start()
    thread.join()
    assert results[0][0]["finish"] == "length"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        one = Counting()
        one.on_feed = interrupt
        assert made(one, most=2)[0]["finish"] == "length"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_ends_it() -> None:
    def gone(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate(Counting(), DECODER, request(), ([1], Numbers()), gone)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_is_told_and_taken_back_before_the_text() -> None:
    told: list[str] = []
    generate(Counting(), DECODER, request(most=1), ([1, 2], Numbers()), told.append, told.append)
    assert told == ["loading", "reading the prompt, 1 of 2 tokens", "reading the prompt, 2 of 2 tokens", "", "3", ""]
