"""Tokens behind a prompt: what is wanted, how a token is chosen, and what is told of it.

A part of ``run.py``: Python 3.9+ and NumPy, with run_generate.py and run_text.py. ``edgeattn generate`` is made of it.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from edgeattn.bundle.runner_generate import Session
    from edgeattn.bundle.runner_text import Numbers, Pieces
if TYPE_CHECKING or __package__:
    from edgeattn.bundle import runner_text as words
else:  # in a bundle
    import run_text as words

Data = dict[str, Any]
Refused = words.Refused
#: Tokens at most where nothing else is asked for.
MOST = 256
#: What a shell calls a program that Ctrl-C ended.
INTERRUPTED = 130


class Request:
    """What is wanted.

    Args:
        prompt: text, for which ``chat`` applies the bundle's template, with ``system`` in front.
        ids: the same in token numbers, as "1,2,3"; then token numbers are made, too.
        most: tokens at most; ``MOST`` without. stop: tokens that end the text beside the bundle's own.
        temperature: 0 for the most likely token. Without: 1 where ``top_k`` or ``top_p`` is given, else 0.
        top_k: so many tokens are drawn from, the most likely ones. top_p: the fewest that have so much together.
        seed: of what is drawn; without one it is drawn, too.

    Raises:
        Refused: a value that there is no sense in.
    """

    def __init__(
        self,
        prompt: str | None = None,
        ids: str | None = None,
        *,
        chat: bool = False,
        system: str | None = None,
        most: int | None = None,
        stop: tuple[int, ...] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        narrowed = top_k is not None or top_p is not None
        self.prompt, self.chat, self.system, self.stop = prompt, chat, system, stop
        self.most = MOST if most is None else most
        self.temperature = float(narrowed) if temperature is None else temperature
        self.top_k, self.top_p = top_k, top_p
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self.ids = None if ids is None else _numbers(ids)
        if (prompt is None) == (ids is None):
            what = "there is no prompt" if ids is None else "there are two prompts"
            raise Refused(2, what, fix="--prompt TEXT, or --ids 1,2,3")
        if ids is not None and (chat or system is not None):
            raise Refused(2, "--chat and --system take a text", fix="--prompt TEXT in place of --ids")
        if system is not None and not chat:
            raise Refused(2, "--system is a part of a chat", fix="add --chat")
        if self.most < 1:
            raise Refused(2, "--max-tokens is too small", most, "the least is 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise Refused(2, "--temperature cannot be used", temperature, "it is a number from 0 on")
        if narrowed and not self.temperature:
            raise Refused(2, "nothing is drawn at --temperature 0", why="--top-k and --top-p say what is drawn from")
        if top_k is not None and top_k < 1:
            raise Refused(2, "--top-k is too small", top_k, "the least is 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise Refused(2, "--top-p cannot be used", top_p, "it is a share: more than 0, and 1 at most")
        if self.seed < 0:
            raise Refused(2, "--seed is negative", seed)


def _numbers(text: str) -> list[int]:
    """Numbers of "1,2,3"."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise Refused(2, "--ids takes token numbers", repr(part), fix="--ids 1,2,3")
    return [int(part) for part in parts]


def tokens_of(decoder: Data, request: Request, place: Callable[[str], str]) -> tuple[list[int], Pieces | Numbers]:
    """The prompt's tokens, and what turns the new ones into what is printed.

    Args:
        decoder: the manifest's. place: the path of a file of the bundle.

    Raises:
        Refused: the prompt is empty, longer than the context, or none of this model's.
    """
    shown: Pieces | Numbers = words.Numbers()
    if request.ids is not None:
        ids = request.ids
    elif not decoder["tokenizer"]:
        raise Refused(2, "the bundle has no tokenizer", why="it takes token numbers alone", fix="--ids 1,2,3")
    else:
        text = request.prompt or ""
        if not text and not request.chat:
            raise Refused(2, "the prompt is empty", fix="--prompt TEXT")
        if request.chat:
            text = words.chat_prompt(decoder, text, request.system)
        tokenizer = words.open_tokenizer(place(decoder["tokenizer"]))
        try:
            ids = tokenizer.encode(text, add_special_tokens=not request.chat).ids
        except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair
            raise Refused(2, "the prompt is no Unicode text", repr(text)[:80]) from error
        shown = words.Pieces(tokenizer)
    if not ids:
        raise Refused(2, "the prompt is empty", why="there is no token in it")
    for number in (*ids, *request.stop):
        if not 0 <= number < decoder["vocabulary"]:
            raise Refused(2, "the model has no such token", number, f"it has 0 to {decoder['vocabulary'] - 1}")
    if len(ids) > decoder["context"]:
        why = f"the context is {decoder['context']} tokens"
        raise Refused(2, "the prompt is longer than the context", f"{len(ids)} tokens", why, "shorten it")
    return ids, shown


class Choice:
    """The next token for logits (vocabulary,), as a request wants it.

    For the same logits and seed the same is drawn. Temperature comes first, then top-k, then top-p.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._random = request, random.Random(request.seed)

    def __call__(self, logits: Any) -> int:
        """Raises Refused: the logits are no numbers."""
        import numpy as np

        asked, highest = self._request, float(logits.max())
        if not math.isfinite(highest):
            raise Refused(1, "the artifact's logits are not finite", highest, fix="verify the bundle")
        if not asked.temperature:
            return int(logits.argmax())
        kept = np.arange(len(logits))
        if asked.top_k is not None and asked.top_k < len(logits):
            kept = np.sort(np.argpartition(-logits, asked.top_k - 1)[: asked.top_k])
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((logits[kept].astype(np.float64) - highest) / asked.temperature)
        if asked.top_p is not None and asked.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            share = np.cumsum(weights[order])
            order = order[: 1 + int(np.searchsorted(share, asked.top_p * share[-1]))]
            kept, weights = kept[order], weights[order]
        edges = np.cumsum(weights)
        drawn = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])


class _Stopped(Exception):
    """By Ctrl-C, in the middle of the prompt."""


class _Interrupt:
    """Ctrl-C as a question: the first ends the text where it is, a second one everything."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self._before: Any = None
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def generate(
    session: Session,
    decoder: Data,
    request: Request,
    prompt: tuple[list[int], Pieces | Numbers],
    write: Callable[[str], None],
    say: Callable[[str], None] = lambda text: None,
) -> Data:
    """Make tokens behind a prompt.

    Args:
        session: a new one. prompt: from ``tokens_of``.
        write: takes the text, piece by piece. say: takes a line about what is going on, "" when the text begins.

    Returns:
        Text and tokens; ``finish``: "stop", "length", "context" or "interrupted"; times in ms, rates in tokens/s, and
        bytes.

    Raises:
        Refused: the logits are not finite.
    """
    (ids, shown), choose, stop = prompt, Choice(request), {*decoder["stop"], *request.stop}
    made: list[int] = []
    pieces: list[str] = []
    finish, token, first_ms, prefill_s, decode_s, steps = "interrupted", -1, None, 0.0, 0.0, 0

    def show(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    def each() -> None:
        if interrupt.asked:
            raise _Stopped
        say(f"reading the prompt, {session.position} of {len(ids)} tokens")

    with _Interrupt() as interrupt:
        try:
            say("loading")
            begun = time.perf_counter()
            session.prepare(len(ids))
            load_ms, begun = (time.perf_counter() - begun) * 1e3, time.perf_counter()
            logits = session.feed(ids, each)
            prefill_s = time.perf_counter() - begun
            token = choose(logits)
            first_ms = (time.perf_counter() - begun) * 1e3
        except _Stopped:
            prefill_s = time.perf_counter() - begun
        finally:
            say("")
        while not interrupt.asked:
            if token in stop:
                finish = "stop"
                break
            made.append(token)
            show(shown.add(token))
            if len(made) == request.most:
                finish = "length"
                break
            if session.position == session.context:
                finish = "context"
                break
            begun = time.perf_counter()
            token = choose(session.feed([token]))
            decode_s, steps = decode_s + time.perf_counter() - begun, steps + 1
        show(shown.end())
    read = min(session.position, len(ids))
    return {
        "text": "".join(pieces) if isinstance(shown, words.Pieces) else None,
        "ids": made,
        "finish": finish,
        "stopped_by": token if finish == "stop" else None,
        "prompt_tokens": len(ids),
        "tokens": len(made),
        "load_ms": load_ms,
        "first_token_ms": first_ms,
        "prefill_tokens_per_s": read / prefill_s if read else None,
        "decode_tokens_per_s": steps / decode_s if steps else None,
        "context": session.context,
        "cached": session.position,
        "cache_bytes": session.cache_bytes or None,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "seed": request.seed if request.temperature else None,
    }


_ENDED = {
    "length": "ended: {tokens} tokens are --max-tokens",
    "stop": "ended: token {stopped_by} ends a text",
    "context": "ended: the context of {context} tokens is full",
    "interrupted": "ended: by Ctrl-C",
}


def figures(result: Data, random_weights: bool, timed: bool = True) -> list[str]:
    """Lines about a result for a person; without times and memory where an emulator's would mean nothing."""
    said = []
    for name, count, kind in (("prompt", "prompt_tokens", "prefill"), ("new", "tokens", "decode")):
        rate = result[f"{kind}_tokens_per_s"] if timed else None
        said.append(f"{name} {result[count]} tokens" + (f", {rate:.1f} tokens/s" if rate else ""))
    if timed and result["first_token_ms"]:
        said[1] += f", the first after {result['first_token_ms']:.1f} ms"
    how = [f"temperature {result['temperature']:g}" if result["temperature"] else "the most likely token each time"]
    how += [f"{name} {result[key]:g}" for name, key in (("top-k", "top_k"), ("top-p", "top_p")) if result[key]]
    how += [f"seed {result['seed']}"] if result["seed"] is not None else []
    held = f"{result['cache_bytes'] / 1e6:.2f} MB" if result["cache_bytes"] else "kept by the runtime"
    memory = f"cache {held}, {result['cached']} of {result['context']} tokens in it"
    memory += f"; peak memory {result['peak_rss_mb']:.0f} MB" if timed and result.get("peak_rss_mb") else ""
    lines = ["; ".join([*said, ", ".join(how)]), memory, _ENDED[result["finish"]].format(**result)]
    return lines + ["the weights are random: the text means nothing"] * random_weights


def say(text: str) -> None:
    """A line on standard error that the next one replaces, where a person looks at it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def add_options(parser: argparse.ArgumentParser, what: Any) -> None:
    """What ``run.py`` takes of a decoder's bundle; of the options in ``what`` there can be one."""
    what.add_argument("--prompt", metavar="TEXT", help="make text behind this one; - reads it from standard input")
    what.add_argument("--ids", metavar="1,2,3", help="the same in token numbers")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question, put by the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"new tokens at most (default: {MOST})")
    zero = "0 takes the most likely token (default: 0; 1 with --top-k or --top-p)"
    parser.add_argument("--temperature", type=float, metavar="T", help=zero)
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that have P together")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same (default: drawn and shown)")
    stop = "a token that ends the text, beside the bundle's own; may be repeated"
    parser.add_argument("--stop", type=int, action="append", default=[], metavar="ID", help=stop)


def on_device(manifest: Data, part: Data, options: argparse.Namespace, threads: int, answers: Any) -> Data:
    """What ``run.py`` makes of --prompt or --ids: text to ``answers`` unless JSON is wanted, and figures to stderr."""
    import run  # type: ignore[import-not-found]
    import run_generate  # type: ignore[import-not-found]

    def write(piece: str) -> None:
        if not options.json:
            answers.write(piece)
            answers.flush()

    names = ("chat", "system", "temperature", "top_k", "top_p", "seed")
    try:
        prompt = words.read_prompt(sys.stdin.buffer) if options.prompt == "-" else options.prompt
        given = {name: getattr(options, name) for name in names}
        request = Request(prompt, options.ids, most=options.max_tokens, stop=tuple(options.stop), **given)
        tokens = tokens_of(manifest["decoder"], request, run.place)
        run.check_first_use(manifest, part, threads)
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ``| head`` ends it without a word, as other programs
        session = run_generate.Session(
            manifest["decoder"], part["entries"], lambda entry: run.open_entry(part, entry, threads)[0]
        )
        result = generate(session, manifest["decoder"], request, tokens, write, say)
    except Refused as refused:
        raise run.Problem(refused.code, str(refused), refused.fix) from refused
    write("\n")
    result.update(backend=part["backend"], threads=threads, peak_rss_mb=run.peak_rss_mb(), holds=True)
    if not options.json:
        print("\n".join(figures(result, manifest["weights"]["kind"] == "random")), file=sys.stderr)
    return {**result, "exit_code": INTERRUPTED} if result["finish"] == "interrupted" else result
