"""Tokens from a decoder's artifact on this machine, by the code that makes them on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeattn import targets
from edgeattn.bundle import runner_prompt, runner_text
from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.runner import peak_rss_mb
from edgeattn.bundle.runner_generate import Run, Session
from edgeattn.bundle.runner_prompt import Request
from edgeattn.core.errors import CheckFailed, EdgeAttnError, ToolchainMissing, UsageError
from edgeattn.core.files import inside
from edgeattn.targets.base import Artifact, Runtime

#: What brings all that text needs, where EdgeAttn is installed.
INSTALL = "pip install 'edgeattn[text]'"


def entry_info(artifact: Artifact) -> dict[str, Any]:
    """Entries as a manifest has them."""
    return {
        name: {"inputs": [vars(t) for t in entry.inputs], "outputs": [vars(t) for t in entry.outputs]}
        for name, entry in artifact.entries.items()
    }


def session(runtime: Runtime, artifact: Artifact, decoder: Mapping[str, Any]) -> Session:
    """A sequence of tokens that the artifact computes."""

    def opener(entry: str) -> Run:
        return lambda feeds: runtime.run(entry, feeds)

    return Session(dict(decoder), entry_info(artifact), getattr(runtime, "opened", opener))


def error_of(refused: runner_text.Refused, where: str) -> EdgeAttnError:
    """The error for what the runner's code refuses."""
    kind: type[EdgeAttnError] = {1: CheckFailed, 3: ToolchainMissing}.get(refused.code, UsageError)
    fix = INSTALL if refused.code == ToolchainMissing.exit_code else refused.fix
    return kind(refused.what, value=refused.value, where=where, why=refused.why, fix=fix)


def check_decoder(bundle: Bundle) -> dict[str, Any]:
    """The manifest's ``decoder``, as plain data.

    Raises:
        UsageError: the bundle is of another kind of model.
    """
    if bundle.manifest.decoder is None:
        raise UsageError(
            "the bundle makes no tokens",
            value=bundle.path,
            why="its model is not a decoder of language",
            fix=f"edgeattn run {bundle.path} --input NAME=FILE.npy",
        )
    return bundle.manifest.decoder.model_dump()


def generate(
    bundle: Bundle,
    request: Request,
    *,
    backend: str | None = None,
    write: Callable[[str], None] = lambda piece: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make text behind a prompt; works without torch where the target's runtime does.

    Args:
        backend: of which artifact; the one in front without.
        write: takes the text, piece by piece. say: see ``runner_prompt.generate``.

    Returns:
        See ``runner_prompt.generate``; and the backend and the peak memory of this process in MB.

    Raises:
        UsageError: no decoder, an unknown backend, or a prompt that is empty, too long or of other tokens.
        ToolchainMissing: the target's runtime, tokenizers or jinja2 is missing. CheckFailed: the logits are not finite.
    """
    decoder, name = check_decoder(bundle), backend or bundle.manifest.backend
    artifact = bundle.artifact(name)
    try:
        prompt = runner_prompt.tokens_of(decoder, request, lambda file: str(inside(bundle.path, file)))
        one = session(targets.get(name).open(artifact), artifact, decoder)
        made = runner_prompt.generate(one, decoder, request, prompt, write, say)
    except runner_text.Refused as refused:
        raise error_of(refused, str(bundle.path)) from refused
    return {**made, "backend": name, "peak_rss_mb": peak_rss_mb()}
