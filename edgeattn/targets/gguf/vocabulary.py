"""A byte-level BPE tokenizer as GGUF metadata, so that llama.cpp turns the same text into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from edgeattn.core.errors import ConversionFailed, UsageError

TOKENIZER = "tokenizer.json"
#: How text is cut before merging, and llama.cpp's names for those that it has code for.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_QWEN2: "qwen2", "": "gpt-2"}


def _split(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``; None if it has none that does the same."""
    outer = content.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    patterns = [p.get("pattern", {}).get("Regex") for p in parts if p.get("type") == "Split"]
    levels = [p for p in parts if p.get("type") == "ByteLevel"]
    others = len(parts) - len(patterns) - len(levels)
    if others or len(levels) != 1 or levels[0].get("add_prefix_space"):
        return None
    # ByteLevel cuts text itself, as GPT-2 does, unless that is left to a pattern before it.
    own = bool(levels[0].get("use_regex", True))
    if own == bool(patterns) or len(patterns) > 1:
        return None
    return _SPLITS.get(patterns[0] if patterns else "")


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Attributes:
        tokens: text and type of every token, by id. split: llama.cpp's name for the pre-tokenizer.
        special: merges, ids of special tokens, and the chat template.
        notes: in what it differs from the original under llama.cpp.
    """

    tokens: tuple[tuple[str, gguf.TokenType], ...]
    split: str
    special: gguf.SpecialVocab
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(folder: Path) -> Vocabulary:
        """Read a folder's ``tokenizer.json``; its ``tokenizer_config.json`` and ``config.json`` name special tokens.

        Raises:
            UsageError: it cannot be read. ConversionFailed: llama.cpp has no code that cuts text as it does.
        """
        path = folder / TOKENIZER
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            model, added = content["model"], content.get("added_tokens", [])
            texts = {int(i): str(text) for text, i in model["vocab"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                "the tokenizer cannot be read", value=path, why=f"{type(error).__name__}: {error}"
            ) from error
        normalizer = (content.get("normalizer") or {}).get("type")
        split = _split(content) if model.get("type") == "BPE" and not model.get("byte_fallback") else None
        if split is None or normalizer not in (None, "NFC"):
            raise ConversionFailed(
                "llama.cpp would turn text into other tokens than the model's tokenizer",
                value=f"{model.get('type')}, {json.dumps(content.get('pre_tokenizer'))[:200]}, normalizer {normalizer}",
                where=str(path),
                why=f"for byte-level BPE it knows the pre-tokenizers {', '.join(_SPLITS.values())}, and no normalizer",
                fix="train the tokenizer with Qwen2's pre-tokenizer, or export for another target",
            )
        types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
        for token in added:
            texts[token["id"]] = token["content"]
            types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens = tuple(
            (texts[i], types[i]) if i in texts else (f"[PAD{i}]", gguf.TokenType.UNUSED) for i in range(max(texts) + 1)
        )
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens))
        notes = ("llama.cpp does not apply NFC: text with decomposed accents becomes other tokens",)
        return Vocabulary(tokens, split, special, notes if normalizer else ())

    def write(self, writer: gguf.GGUFWriter, count: int) -> None:
        """Add it to a file whose embedding has ``count`` rows; those beyond the tokens are unused ones.

        Raises:
            ConversionFailed: there are more tokens than rows.
        """
        if len(self.tokens) > count:
            raise ConversionFailed(
                "the tokenizer has more tokens than the model",
                value=f"{len(self.tokens)} tokens, vocab_size {count}",
                fix="take the tokenizer that the model was trained with",
            )
        unused = [(f"[PAD{i}]", gguf.TokenType.UNUSED) for i in range(len(self.tokens), count)]
        texts, types = zip(*self.tokens, *unused, strict=True)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(texts)
        writer.add_token_types(types)
        if "bos" not in self.special.add_special_token:
            writer.add_add_bos_token(False)
        self.special.add_to_gguf(writer, quiet=True)
