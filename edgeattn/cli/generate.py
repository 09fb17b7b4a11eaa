"""``edgeattn generate``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.bundle import Bundle
    from edgeattn.bundle.runner_prompt import Request


@click.command("generate", short_help="Make text with a language model's bundle.")
@click.argument("bundle", type=click.Path())
@click.option("--prompt", "-p", metavar="TEXT", help="What comes before; - or nothing reads it from standard input.")
@click.option("--ids", metavar="1,2,3", help="The same in token numbers; token numbers come out.")
@click.option("--chat", is_flag=True, help="The prompt is a question, put by the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: what the model is told first.")
@click.option("--max-tokens", "-n", type=int, metavar="N", help="New tokens at most. [default: 256]")
@click.option("--temperature", type=float, metavar="T", help="0 takes the most likely token. [default: see below]")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most likely tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the fewest tokens that have P together.")
@click.option("--seed", type=int, metavar="N", help="The same seed draws the same. [default: drawn, and shown]")
@click.option("--stop", type=int, multiple=True, metavar="ID", help="A token that ends the text; may be repeated.")
@click.option("--backend", "-b", help="Which artifact, where the bundle holds several. [default: the one in front]")
@click.option("--device", "-d", help="Do it there: a device's name, ssh://user@host, qemu://cortex-a76, local.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads on the --device. [default: up to 4]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in the end.")
def command(
    bundle: str,
    prompt: str | None,
    ids: str | None,
    max_tokens: int | None,
    backend: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Make text behind a prompt with BUNDLE, on this machine or on a device.

    The text alone goes to standard output, as it comes; figures go to standard error. Of a prompt from standard input
    the newline at its very end is left away. Without --temperature it is 0, and the most likely token is taken each
    time; with --top-k or --top-p it is 1. Ctrl-C ends the text, with exit code 130.

    \b
      edgeattn generate plm-tiny.onnx.w4 --prompt "Return the"
      edgeattn generate plm-tiny.onnx.w4 --chat --prompt "What does len do?" --temperature 0.8 --top-p 0.95
      edgeattn generate plm-tiny.onnx.w4 --device pi --prompt - < question.txt
    """
    import json

    from edgeattn.bundle import Bundle
    from edgeattn.bundle.decoding import check_decoder, error_of
    from edgeattn.bundle.runner_prompt import INTERRUPTED, Request, figures
    from edgeattn.bundle.runner_text import Refused
    from edgeattn.core.errors import UsageError

    opened = Bundle.open(bundle)
    check_decoder(opened)
    if threads is not None and device is None:
        raise UsageError("--threads is for a device", fix="add --device local: the bundle's own runner")
    try:
        request = Request(_prompt(prompt, ids), ids, most=max_tokens, **given)
    except Refused as refused:
        raise error_of(refused, str(opened.path)) from refused
    if device is None:
        result, timed = _here(opened, request, backend, as_json), True
    else:
        words = {"ids": ids, "prompt": request.prompt, "backend": backend, "threads": threads}
        result, timed = _there(opened, device, request, words, as_json)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _write("\n")
        emulated = [f"on {device}, emulated: its tokens are the device's, its times would mean nothing"]
        for line in [*figures(result, opened.manifest.weights.kind == "random", timed), *emulated[timed:]]:
            click.echo(line, err=True)
    if result["finish"] == "interrupted":
        sys.exit(INTERRUPTED)


def _prompt(prompt: str | None, ids: str | None) -> str | None:
    """The prompt; from standard input for "-", and where there is none and nobody types."""
    from edgeattn.bundle.runner_text import read_prompt

    typed = sys.stdin is None or sys.stdin.isatty()
    if prompt == "-" or (prompt is None and ids is None and not typed):
        return "" if sys.stdin is None else read_prompt(sys.stdin.buffer)
    return prompt


def _write(text: str) -> None:
    """To standard output at once, in UTF-8 whatever the terminal's language; where nobody reads on, that is the end."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _here(bundle: Bundle, request: Request, backend: str | None, quiet: bool) -> dict[str, Any]:
    from edgeattn.bundle.decoding import generate
    from edgeattn.bundle.runner_prompt import say

    return generate(bundle, request, backend=backend, write=(lambda piece: None) if quiet else _write, say=say)


def _there(
    bundle: Bundle, device: str, request: Request, words: dict[str, Any], quiet: bool
) -> tuple[dict[str, Any], bool]:
    """What the bundle's own ``run.py`` makes there, shown when it is whole; and whether its times mean something."""
    from edgeattn.cli._show import Status
    from edgeattn.profile.transports import open_transport

    transport = open_transport(device)
    words |= {"system": request.system, "max-tokens": request.most, "seed": request.seed}
    words |= {"temperature": request.temperature, "top-k": request.top_k, "top-p": request.top_p}
    arguments = [f"--{name}={value}" for name, value in words.items() if value is not None]
    arguments += [f"--stop={token}" for token in request.stop] + ["--chat"] * request.chat
    with Status() as status:
        status.say(f"making tokens on {transport.url}")
        answer = transport.run(bundle.path, arguments, status.say)
    if not quiet:
        _write(",".join(map(str, answer["ids"])) if answer["text"] is None else answer["text"])
    return {"device": device, "emulated": transport.emulated, **answer}, not transport.emulated
