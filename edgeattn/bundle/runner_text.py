"""Between text and tokens: a bundle's tokenizer and chat template, and the text of tokens as they come.

A part of ``run.py``: Python 3.9+ and tokenizers, for chats jinja2. ``edgeattn generate`` uses it too.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

Data = dict[str, Any]
#: What bytes become that are no UTF-8, or not yet.
BROKEN = "\ufffd"


class Refused(Exception):
    """What cannot be done: the exit code, what failed, the value, why, and what to do."""

    def __init__(self, code: int, what: str, value: object = None, why: str = "", fix: str = "") -> None:
        super().__init__(what + (f": {value}" if value is not None else "") + (f"; {why}" if why else ""))
        self.code, self.what, self.value, self.why, self.fix = code, what, value, why, fix


def read_prompt(stream: Any) -> str:
    """A prompt from a stream of bytes, without the newline that ends it."""
    try:
        text: str = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(2, "the prompt is not UTF-8", f"byte {error.start}", error.reason) from error
    return text[:-1] if text.endswith("\n") else text


class Pieces:
    """The text of tokens that come one by one, in pieces that together are the text of all of them.

    A character whose bytes are spread over several tokens comes with the last of them; what never becomes a character
    comes as U+FFFD when something else follows. Tokens that the tokenizer does not know show as ``<|id N|>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # whose text is out: what a decoder looks back at
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending tokens that are out

    def add(self, token: int) -> str:
        """What can be shown now that ``token`` is there."""
        if self._tokenizer.id_to_token(token) is None:
            return f"{self.end()}<|id {token}|>"
        self._pending.append(token)
        text = self._text()
        whole = text.rstrip(BROKEN)
        piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if whole == text:
            self._before, self._pending, self._shown = self._pending, [], 0
        return piece

    def end(self) -> str:
        """What is left when nothing follows."""
        piece = self._text()[self._shown :]
        self._before, self._pending, self._shown = [], [], 0
        return piece

    def _text(self) -> str:
        """Of the pending tokens."""
        if not self._pending:
            return ""
        before: str = self._tokenizer.decode(self._before) if self._before else ""
        both: str = self._tokenizer.decode(self._before + self._pending)
        return both[len(before) :]


class Numbers:
    """Token numbers in place of text, as ``--ids`` takes them."""

    def __init__(self) -> None:
        self._several = False

    def add(self, token: int) -> str:
        """See ``Pieces``."""
        piece, self._several = f",{token}" if self._several else str(token), True
        return piece

    def end(self) -> str:
        """See ``Pieces``."""
        return ""


def open_tokenizer(path: str) -> Any:
    """The tokenizer of a file.

    Raises:
        Refused: the package is missing, or the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("tokenizers", "it turns text into tokens", error) from error
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # its exceptions are plain ones
        name = os.path.basename(path)
        raise Refused(1, "the tokenizer is damaged", name, str(error), "copy the bundle again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _missing(name: str, purpose: str, error: ImportError, all_needed: str = "") -> Refused:
    fix = f"python3 -m pip install {all_needed or name}"
    return Refused(3, f"{name} is not installed", why=f"{purpose} ({error})", fix=fix)


def chat_prompt(decoder: Data, prompt: str, system: str | None) -> str:
    """A prompt as the bundle's chat template has it, up to where the answer begins.

    Raises:
        Refused: there is no template, jinja2 is missing, or the template refuses.
    """
    if not decoder["chat_template"]:
        raise Refused(2, "the bundle has no chat template", fix="leave --chat away")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise _missing("jinja2", "it fills the chat template in", error, "tokenizers jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # What templates are written for: these settings and names are those of Hugging Face's transformers.
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = as_json
    made.globals.update(raise_exception=refuse, strftime_now=time.strftime)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    known = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return made.from_string(decoder["chat_template"]).render({**decoder["special_tokens"], **known})
    except Exception as error:  # a template is a program, and another's
        raise Refused(2, "the chat template refuses this", why=f"{type(error).__name__}: {error}") from error
