"""What CI reads of a run of checks: JUnit, annotations, code quality, Markdown, the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.report.checks.ci import code_quality, command, workflow_commands
from edgeattn.report.checks.data import Checked, Finding, Item, Place, Run
from edgeattn.report.checks.html import html
from edgeattn.report.checks.junit import junit
from edgeattn.report.checks.markdown import markdown
from edgeattn.report.checks.table import headline, table

EVIL = "<script>alert(1)</script>|`*_[x](y)\n::error::\x00\x1b[31m\ud800"
PLACE = Place("edgeattn.toml", 4)
CELL = {"target": "onnx", "precision": "fp32", "device": None}


def finding(severity: str, fails: bool = False, text: str = "a detail", place: Place = PLACE) -> Finding:
    data = {"target": "onnx", "rule": "a-rule", "severity": severity, "module": "m", "what": "a pattern"}
    return Finding({**data, "detail": text, "mend": "mend it"}, place, fails)


def cell(suite: str, *items: Item, lint: tuple[Finding, ...] = (), **more: object) -> Checked:
    return Checked(suite, "onnx fp32", CELL, items, lint=lint, **more)  # type: ignore[arg-type]


def run(*cells: Checked, changes: tuple[str, ...] = ()) -> Run:
    return Run("edgeattn.toml", "2026-01-02T03:04:05Z", "1.0", cells, changes, 2.0)


def whole(text: str = "words") -> Run:
    """A run with one of each kind; ``text`` is wherever a name or an error may put one."""
    return run(
        cell(
            text,
            Item("export", "held", text, PLACE),
            Item("size", "failed", text, Place(text, 3), text, text, (text,)),
            Item("lint", "failed", text, PLACE, text, text),
            lint=(finding("error", True, text), finding("note", False, text)),
            facts={"relative_l2": 1e-6, "accuracy": 0.5, "size_mb": 1.0, "nodes": 7},
            seconds=1.5,
            latency={
                "verdict": "pass",
                "ratio": {"value": 1.0, "low": 0.9, "high": 1.1},
                "self_check": {"value": 1.0, "low": 0.98, "high": 1.02},
            },
        ),
        cell("b", Item("export", "skipped", text, PLACE), Item("latency", "warned", text, PLACE)),
        changes=(text,),
    )


#: Elements and attributes of the JUnit schemas of Jenkins and of Windy Road, as far as both have them, in order.
SHAPE = {
    "testsuites": (set(), set(), ["testsuite"]),
    "testsuite": (
        {"name", "timestamp", "hostname", "tests", "failures", "errors", "time", "id", "package"},
        {"skipped"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), set(), []),
    "testcase": ({"name", "classname", "time"}, set(), ["skipped", "failure"]),
    "failure": ({"type", "message"}, set(), []),
    "skipped": ({"message"}, set(), []),
    "system-out": (set(), set(), []),
    "system-err": (set(), set(), []),
}


def check_shape(element: xml.Element) -> None:
    needed, allowed, order = SHAPE[element.tag]
    assert needed <= set(element.attrib) <= needed | allowed, element.tag
    places = [order.index(child.tag) for child in element]
    assert places == sorted(places)
    if element.tag == "testcase":
        assert len(element) <= 1
    if element.tag == "testsuite":
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.attrib["timestamp"])
        assert [child.tag for child in element if child.tag != "testcase"] == [t for t in order if t != "testcase"]
        assert int(element.attrib["tests"]) == len(element.findall("testcase"))
        assert int(element.attrib["failures"]) == len(element.findall("testcase/failure"))
        assert int(element.attrib["skipped"]) == len(element.findall("testcase/skipped"))
    for child in element:
        check_shape(child)


@pytest.mark.parametrize("text", ["words", EVIL], ids=["plain", "hostile"])
def test_junit_is_valid(text: str) -> None:
    root = xml.fromstring(junit(whole(text)).encode("utf-8"))
    check_shape(root)
    assert [len(suite.findall("testcase/failure")) for suite in root] == [2, 0]
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None
    assert (failure.text or "").startswith(f"{text}:3\n" if text == "words" else "<script>")


@given(st.text())
def test_junit_holds_any_text(text: str) -> None:
    check_shape(xml.fromstring(junit(whole(text)).encode("utf-8")))


def test_annotations_stand_at_their_lines() -> None:
    found = run(
        cell("a", Item("size", "failed", "too large", Place("sub/edgeattn.toml", 9), fix="shrink")),
        cell("b", Item("latency", "warned", "100 % unsure", PLACE)),
        cell("c", Item("lint", "failed", "x", PLACE), lint=(finding("error", True, place=Place("net.py", 12)),)),
        cell("d", lint=(finding("warning", place=Place("net.py", 3)), finding("note"))),
    )
    assert list(workflow_commands(found)) == [
        "::error file=sub/edgeattn.toml,line=9,title=a onnx fp32%3A size::too large%0ATo do: shrink",
        "::warning file=edgeattn.toml,line=4,title=b onnx fp32%3A latency::100 %25 unsure",
        "::error file=net.py,line=12,title=c%3A a-rule (onnx)::a pattern: a detail, in m%0ATo do: mend it",
        "::warning file=net.py,line=3,title=d%3A a-rule (onnx)::a pattern: a detail, in m%0ATo do: mend it",
    ]


@given(st.text(), st.text())
def test_an_annotation_is_one_line_whatever_it_says(title: str, message: str) -> None:
    line = command("error", Place("a,b:c.toml", 1), title, message)
    assert not re.search(r"[\r\n]", line)
    head, _, rest = line.removeprefix("::error ").partition("::")
    names = [part.partition("=")[0] for part in head.split(",")]
    assert names == ["file", "line", "title"], "no text ends the properties, or adds one"
    decoded = rest.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    assert decoded == message


def test_code_quality_has_what_gitlab_asks_for() -> None:
    found = json.loads(code_quality(whole()))
    assert len(found) == 3
    for issue in found:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["lines"]["begin"] >= 1
    assert len({issue["fingerprint"] for issue in found}) == len(found)


def test_markdown_shows_names_as_they_are() -> None:
    page = markdown(whole(EVIL))
    assert "<script>" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    tables = re.findall(r"(?:^\|.*\n)+", page, re.M)
    for body in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines()}
        assert len(widths) == 1, body
    assert len(rows) > 6
    assert "0.900 to 1.100" in page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_page_escapes_and_opens_what_failed() -> None:
    plain, evil = _Tags(), _Tags()
    plain.feed(html(whole()))
    evil.feed(html(whole(EVIL)))
    assert plain.tags == evil.tags
    assert "script" not in evil.tags
    assert html(whole()).count("<details open>") == 2


def test_the_table_leaves_out_what_nobody_says() -> None:
    heads, rows = table(run(cell("a", Item("export", "held", "x", PLACE), facts={"size_mb": 1.0})))
    assert heads == ("", "model", "target", "precision", "MB")
    assert rows == [("✓", "a", "onnx", "fp32", "1.00")]


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        (["held"], "the export held"),
        (["held", "held"], "all 2 exports held"),
        (["held", "warned"], "all 2 exports held, 1 with a warning"),
        (["failed"], "1 of 1 export did not hold"),
        (["failed", "held", "warned"], "1 of 3 exports did not hold"),
    ],
)
def test_the_headline(statuses: list[str], words: str) -> None:
    cells = [cell(str(n), Item("x", status, "", PLACE)) for n, status in enumerate(statuses)]  # type: ignore[arg-type]
    assert headline(run(*cells)) == words
