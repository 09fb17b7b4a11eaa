"""Names of records are text wherever they are shown, whatever they hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeattn.profile.record import Breakdown, Operation, Record
from edgeattn.report.records import page as pages
from edgeattn.report.records.html import html
from edgeattn.report.records.markdown import markdown
from edgeattn.report.records.words import plain
from tests.report.making import record

NASTY = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}{% raw %}",
    "a|b`c*d_e[f](g)",
    "%{customdata}",
    "&lt;b&gt;",
    "line\nend\u2028\x00\u202e",
)


def hostile(name: str) -> Record:
    """A record with ``name`` everywhere that a name can stand."""
    ops = (Operation(name=name, module=name, op=name, unit=name, ms=1.0, share=1.0, macs=10, bytes=10),)
    return record(
        model=name,
        target=name,
        device=name,
        metric=name,
        unproven=name,
        cpu=name,
        runtime=name,
        bundle=name,
        flags=(name,),
        partial=name,
        versions={name: name},
        quantized=({"module": name, "bits": name, "error": 0.1},),
        lint=({"rule": name, "severity": name, "where": name, "text": name},),
        numerics={name: {name: {"relative_l2": 0.1, "sqnr_db": None, "max_abs": 1.0, "cosine": 1.0}}},
        breakdown=Breakdown(operations=ops, source=name, wanted=name, fallback={name: {"ops": 1.0, "time": 2.0}}),
    )


class Parsed(HTMLParser):
    """Elements with the names of their attributes, texts, and what the JSON blocks hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.blocks: list[Any] = []
        self._json = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._json = ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._json:
            self.blocks.append(json.loads(data))
            self._json = False
        self.texts.append(data)


@pytest.fixture(scope="module", autouse=True)
def _no_plotly() -> Any:
    """Its script of 5 MB is not what is looked at here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pages, "_plotly", lambda: "var Plotly;")
    yield
    patch.undo()


def check_page(name: str) -> None:
    found = Parsed(html([hostile(name)]))
    usual = Parsed(html([hostile("a" * max(1, len(plain(name))))]))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in usual.elements]
    attributes = {attribute for _, own in found.elements for attribute in own}
    assert attributes == {attribute for _, own in usual.elements for attribute in own}
    assert plain(name) in found.texts
    overview, detail = found.blocks
    assert overview["records"][0]["metric"] == plain(name)
    assert detail["operations"]["rows"][0][1] == plain(name)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_names_are_text(name: str) -> None:
    check_page(name)


# A name that is empty or blank is shown as a dash or as nothing, and has no text to find.
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(min_size=1, max_size=25).filter(lambda name: name.strip()))
@example("main")
def test_any_name_is_text(name: str) -> None:
    check_page(name)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_json_in_a_script_is_not_left(text: str) -> None:
    block = pages.block({text: [text]})
    assert not set("<>&\u2028\u2029") & set(block)
    assert json.loads(block) == {text: [text]}


def check_markdown(name: str) -> None:
    text = markdown([hostile(name)])
    own = re.sub(r"<!-- -->|</?details>|<summary>|</summary>", "", text)
    assert "<" not in own
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", NASTY)
def test_nasty_names_in_markdown(name: str) -> None:
    check_markdown(name)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(alphabet=st.sampled_from("|\\`<>&@#_*[]a \n\u2028"), min_size=1, max_size=12))
def test_any_name_in_markdown(name: str) -> None:
    check_markdown(name)


def test_what_cannot_be_seen_is_marked() -> None:
    assert plain("a\u202eb\x1b[31m\tc\n") == "a\ufffdb\ufffd[31m c "
    assert plain("größe 漢字 👩‍🔬") == "größe 漢字 👩‍🔬"
