"""What a checkpoint's folder says about its tokenizer: stop tokens and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeattn.core.errors import UsageError

FILE = "tokenizer.json"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file.

    Raises:
        UsageError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UsageError("a file of the checkpoint is damaged", value=path, why=str(error)) from error
    if not isinstance(content, dict):
        raise UsageError("a file of the checkpoint is damaged", value=path, why="it is no JSON object")
    return content


def stop_tokens(folder: Path) -> list[int]:
    """Token numbers that end a text: of ``generation_config.json`` and ``config.json``, and the end of a chat turn."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        given = _read(folder / name).get("eos_token_id")
        found += [n for n in (given if isinstance(given, list) else [given]) if isinstance(n, int)]
    own = _read(folder / FILE).get("added_tokens", [])
    known = {t["content"]: t["id"] for t in own if isinstance(t, dict) and {"content", "id"} <= set(t)}
    names = [special_tokens(folder).get("eos_token"), "<|im_end|>", "<|endoftext|>"]
    return sorted({*found, *(known[name] for name in names if name in known)})


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the tokens that have a part of their own, such as ``eos_token``."""
    given = _read(folder / "tokenizer_config.json")
    named = {key: value for key, value in given.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def chat_template(folder: Path) -> str:
    """The template (Jinja) that turns messages into a prompt; "" where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), "")
    return given if isinstance(given, str) else ""
