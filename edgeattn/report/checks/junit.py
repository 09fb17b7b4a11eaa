"""JUnit XML, in the form that both Jenkins' and GitLab's readers take: one suite a model, one case an item of a cell.

Neither schema knows a file and a line of a case: they are in the failure's text.
"""

from __future__ import annotations

import re
import socket
from xml.etree import ElementTree as xml

from edgeattn.report.checks.data import Checked, Item, Run

#: Characters that XML 1.0 cannot hold, not even as references.
_FORBIDDEN = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(run: Run) -> str:
    """The document. A warning is a case that passed, with its words as output."""
    root = xml.Element("testsuites")
    suites: dict[str, list[Checked]] = {}
    for cell in run.cells:
        suites.setdefault(cell.suite, []).append(cell)
    for number, (name, cells) in enumerate(suites.items()):
        items = [item for cell in cells for item in cell.items]
        suite = xml.SubElement(
            root,
            "testsuite",
            id=str(number),
            package="edgeattn",
            name=_clean(name),
            hostname=_clean(socket.gethostname()) or "localhost",
            timestamp=run.created.removesuffix("Z"),
            tests=str(len(items)),
            failures=str(sum(item.status == "failed" for item in items)),
            errors="0",
            skipped=str(sum(item.status == "skipped" for item in items)),
            time=f"{sum(cell.seconds for cell in cells):.3f}",
        )
        xml.SubElement(suite, "properties")
        for cell in cells:
            for item in cell.items:
                _case(suite, cell, item)
        warned = [f"{c.label}: {i.name}: {i.words}" for c in cells for i in c.items if i.status == "warned"]
        xml.SubElement(suite, "system-out").text = _clean("\n".join(warned))
        xml.SubElement(suite, "system-err")
    xml.indent(root, " ")
    text: str = xml.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: xml.Element, cell: Checked, item: Item) -> None:
    classname = ".".join([cell.suite, *(part for part in cell.name.split(" "))])
    # All of a cell's time is the export's: the items only look at it.
    seconds = cell.seconds if item is cell.items[0] else 0.0
    case = xml.SubElement(suite, "testcase", name=item.name, classname=_clean(classname), time=f"{seconds:.3f}")
    if item.status == "skipped":
        xml.SubElement(case, "skipped", message=_clean(item.words))
    elif item.status == "failed":
        failure = xml.SubElement(case, "failure", type=item.name, message=_clean(item.words))
        parts = [str(item.place), item.words, item.why, *item.details, item.fix and f"To do: {item.fix}"]
        failure.text = _clean("\n".join(part for part in parts if part))


def _clean(text: str) -> str:
    """Without what XML cannot hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
