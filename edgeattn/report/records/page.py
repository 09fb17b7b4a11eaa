"""One HTML file that needs nothing beside it: template, style, scripts and data together.

Names from records reach the page in two ways alone: through the template, which escapes them, and as JSON in a block
that is no script, in which ``<`` is written as an escape. The script sets them as text, or escapes them for Plotly. A
content security policy allows this page's own scripts by their hashes and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from edgeattn.core.errors import ToolchainMissing
from edgeattn.report.records.tables import Table

#: In the order in which the browser runs them.
_SCRIPTS = ("charts.js", "details.js", "sweep.js", "page.js")


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        words: a sentence on what is shown. more: key of a record's details with more words.
        chart, made: names of a chart and of a table that the script makes; "" for none.
        choices: pairs (value, label) of what the chart can show. one: of one record, the one that is picked.
        filtered: whether the field that filters records stands here.
    """

    id: str
    title: str
    words: str
    table: Table | None = None
    chart: str = ""
    made: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    one: bool = False
    filtered: bool = False
    more: str = ""


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        facts: triples (name, value, kind) on top; kind is "", "warn" or "bad". notes: what must be known of it all.
        data: for charts over everything: ``{"records": [...], "metrics": [...]}``.
        one: title of what is picked; names, details: what can be picked, and the data of each.
    """

    title: str
    lead: str
    sections: list[Section]
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=lambda: {"records": [], "metrics": []})
    one: str = ""
    names: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    foot: str = ""


def check_installed() -> None:
    """Say before the work that a page cannot be made.

    Raises:
        ToolchainMissing: jinja2 or plotly is not installed.
    """
    for name in ("jinja2", "plotly"):
        try:
            __import__(name)
        except ImportError as error:
            raise ToolchainMissing(
                "a page needs jinja2 and plotly",
                why=f"{name} cannot be imported: {error}",
                fix="pip install 'edgeattn[report]'",
            ) from error


def block(data: Any) -> str:
    """JSON that is safe inside of a ``<script>`` element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _file(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped,unused-ignore]

    # As the browser's parser reads it, or its hash would be another one.
    text: str = get_plotlyjs()
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: list[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    own = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {own}; {rest}"


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        ToolchainMissing: jinja2 or plotly is not installed.
    """
    check_installed()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    scripts = [_plotly(), "\n".join(_file(name) for name in _SCRIPTS)]
    # Our own files, and JSON that ``block`` has made safe: all that is not escaped.
    return environment.from_string(_file("page.html")).render(
        page=page,
        policy=_policy(scripts),
        css=Markup(_file("page.css")),
        data=Markup(block(page.data)),
        details=[Markup(block(detail)) for detail in page.details],
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
    )
