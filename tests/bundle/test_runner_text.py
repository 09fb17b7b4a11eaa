"""Between text and tokens: pieces of text that together are the whole, and prompts as the tokenizer wants them."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeattn.bundle.runner_text import BROKEN, Numbers, Pieces, Refused, chat_prompt, open_tokenizer, read_prompt
from tests.conftest import ROOT

PLM_TINY = ROOT / "recipes" / "checkpoints" / "plm-tiny"
#: The template of the released PLM checkpoints, which adds a system turn without a full stop.
CHATML = json.loads((PLM_TINY / "tokenizer_config.json").read_text("utf-8"))["chat_template"]

TEXT = "Zürich 東京 кошка 😀👩‍👩‍👧 naïve def f(x): return x  # ½ \n\t'ſ'" * 3


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """Byte-level BPE so small that most characters beside ASCII are spread over several tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return made


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    shown = Pieces(tokenizer)
    return [*(shown.add(token) for token in ids), shown.end()]


def whole_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """As ``Pieces`` promises it: the tokenizer's own text, with tokens that it does not know shown by their numbers."""
    text, run = "", []
    for token in ids:
        if tokenizer.id_to_token(token) is None:
            text, run = f"{text}{tokenizer.decode(run)}<|id {token}|>", []
        else:
            run.append(token)
    return text + tokenizer.decode(run)


@given(ids=st.lists(st.integers(0, 300), max_size=40))
@settings(max_examples=400, deadline=None)
def test_pieces_of_any_tokens_are_the_whole_text(small: Tokenizer, ids: list[int]) -> None:
    pieces, whole = pieces_of(small, ids), whole_of(small, ids)
    assert "".join(pieces) == whole
    if BROKEN not in whole:
        assert not any(BROKEN in piece for piece in pieces)


@given(text=st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_pieces_of_a_text_never_show_half_a_character(small: Tokenizer, text: str) -> None:
    ids = small.encode(text).ids
    pieces = pieces_of(small, ids)
    assert "".join(pieces) == unicodedata.normalize("NFC", text)
    for piece in pieces:
        piece.encode("utf-8")
        assert BROKEN not in piece or BROKEN in text


def test_a_character_comes_with_the_last_of_its_tokens(small: Tokenizer) -> None:
    ids = small.encode("a𐍈b").ids
    assert len(ids) == 6
    assert pieces_of(small, ids) == ["a", "", "", "", "𐍈", "b", ""]


def test_bytes_that_never_become_a_character(small: Tokenizer) -> None:
    hwair, a = small.encode("𐍈").ids, small.encode("a").ids
    assert pieces_of(small, [*hwair[:2], *a]) == ["", "", f"{BROKEN}a", ""]
    assert pieces_of(small, hwair[:3]) == ["", "", "", BROKEN]
    assert pieces_of(small, [*a, hwair[3], *hwair]) == ["a", "", "", "", "", f"{BROKEN}𐍈", ""]


def test_text_before_half_a_character_does_not_wait_for_it() -> None:
    class Joined:
        """A tokenizer whose first token is a letter and half a character."""

        def id_to_token(self, token: int) -> str:
            return "x"

        def decode(self, ids: list[int]) -> str:
            return b"".join([b"a\xe2\x82", b"\xac"][i] for i in ids).decode("utf-8", "replace")

    assert pieces_of(Joined(), [0, 1, 0]) == ["a", "€", "a", BROKEN]


def test_tokens_above_the_tokenizers_show_as_numbers(small: Tokenizer) -> None:
    (a,), hwair = small.encode("a").ids, small.encode("𐍈").ids
    assert pieces_of(small, [151_900, a]) == ["<|id 151900|>", "a", ""]
    assert pieces_of(small, [hwair[0], 5000, a]) == ["", f"{BROKEN}<|id 5000|>", "a", ""]


def test_a_replacement_character_that_is_meant(small: Tokenizer) -> None:
    ids = small.encode(f"a{BROKEN}b").ids
    assert "".join(pieces_of(small, ids)) == f"a{BROKEN}b"


def test_special_tokens_are_not_text(small: Tokenizer) -> None:
    end = small.token_to_id("<|end|>")
    first, *rest = small.encode("𐍈").ids
    assert "".join(pieces_of(small, [end, first, end, *rest, end])) == "𐍈"


def test_spaces_of_a_tokenizer_that_marks_words() -> None:
    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    made.decoder = decoders.Metaspace()
    assert made.decode([0, 1, 2, 1]) == "a bc b"
    assert pieces_of(made, [0, 1, 2, 1]) == ["a", " b", "c", " b", ""]


@given(ids=st.lists(st.integers(0, 2047), max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_small_plms_own_tokenizer(ids: list[int]) -> None:
    tokenizer = open_tokenizer(str(PLM_TINY / "tokenizer.json"))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_prompts_are_composed_by_the_tokenizer_itself() -> None:
    tokenizer = open_tokenizer(str(PLM_TINY / "tokenizer.json"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids
    assert tokenizer.encode("12345").ids == [tokenizer.token_to_id(digit) for digit in "12345"]


def test_numbers() -> None:
    shown = Numbers()
    assert [shown.add(7), shown.add(0), shown.end()] == ["7", ",0", ""]


def test_a_tokenizer_that_cuts_prompts_off_does_so_no_more(small: Tokenizer, tmp_path: Path) -> None:
    cut = Tokenizer.from_str(small.to_str())
    cut.enable_truncation(3)
    cut.enable_padding(length=64)
    cut.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert opened.encode("a b c d e f").ids == small.encode("a b c d e f").ids


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": null}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(Refused, match=r"damaged: tokenizer\.json") as caught:
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert caught.value.code == 1


@pytest.mark.parametrize(("name", "fix"), [("tokenizers", "tokenizers"), ("jinja2", "tokenizers jinja2")])
def test_a_missing_package_has_its_install_line(monkeypatch: pytest.MonkeyPatch, name: str, fix: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match=f"{name} is not installed") as caught:
        open_tokenizer("x") if name == "tokenizers" else chat_prompt(decoder(CHATML), "x", None)
    assert (caught.value.code, caught.value.fix) == (3, f"python3 -m pip install {fix}")


@pytest.mark.parametrize(
    ("sent", "text"),
    [(b"a\n", "a"), (b"a\n\n", "a\n"), (b"a", "a"), (b"", ""), (b"\n", ""), (b" a\r\n", " a\r"), ("é".encode(), "é")],
)
def test_a_prompt_from_a_stream_loses_its_last_newline_alone(sent: bytes, text: str) -> None:
    assert read_prompt(io.BytesIO(sent)) == text


def test_a_prompt_of_other_bytes_is_refused() -> None:
    with pytest.raises(Refused, match="not UTF-8: byte 2") as caught:
        read_prompt(io.BytesIO(b"ab\xff"))
    assert caught.value.code == 2


def decoder(template: str, **special: str) -> dict[str, Any]:
    return {"chat_template": template, "special_tokens": special}


def test_the_chat_template_of_plm() -> None:
    default = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    user = "<|im_start|>user\nWho <b> {{are}} you?\n<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt(decoder(CHATML), "Who <b> {{are}} you?\n", None) == default + user
    told = "<|im_start|>system\n<|im_end|>\n"
    assert chat_prompt(decoder(CHATML), "Who <b> {{are}} you?\n", "") == told + user


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{{ bos_token }}{% for m in messages %}\n  {{ m.content }}\n{% endfor %}", "<s>  hi ü\n"),
        ("{% for m in messages %}{% if loop.index > 0 %}{% break %}{% endif %}x{% endfor %}y", "y"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi ü"}]'),
        ("{% if tools is none and add_generation_prompt %}ok{% endif %}{{ strftime_now('%%') }}", "ok%"),
    ],
)
def test_what_templates_are_written_for(template: str, made: str) -> None:
    assert chat_prompt(decoder(template, bos_token="<s>"), "hi ü", None) == made


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_refuses_or_must_not(template: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        chat_prompt(decoder(template), "hi", None)
    assert caught.value.code == 2


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(Refused, match="no chat template"):
        chat_prompt(decoder(""), "hi", None)
