"""A sweep as a page and as Markdown: what each cell came to, with its evidence, and which of them nothing beats.

All is made from the sweep's plain data: ``name``, ``edgeattn``, ``created``, ``seconds`` and ``cells``, each with
``model``, ``target``, ``precision``, ``device`` (or None), ``label``, ``state`` (held, failed, unsupported, toolchain),
``error`` (its parts, its kind) of those that did not hold, and of those that were run ``stage``, ``bundle``, ``digest``
and ``facts``, see ``pipeline.cells``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.report.pareto import front
from edgeattn.report.records.charts import short
from edgeattn.report.records.markdown import MOST, as_markdown, escape
from edgeattn.report.records.page import Page, Section, render
from edgeattn.report.records.tables import Badge, Cell, Column, Table, figure, text
from edgeattn.report.records.words import NONE, count, error, number, plain

Row = Mapping[str, Any]

#: States in words, and how loud they are.
STATES = {
    "held": ("held", "good"),
    "failed": ("failed", "bad"),
    "unsupported": ("unsupported", "info"),
    "toolchain": ("toolchain missing", "warn"),
}
#: What an error is set against a cost in: fields of ``figures``, titles, and whether the error's axis is logarithmic.
PLANES: dict[str, tuple[str, str, str, str, bool]] = {
    "error, size": ("size_mb", "relative_l2", "size, MB", "relative L2", True),
    "error, latency": ("estimate_ms", "relative_l2", "estimated latency, ms", "relative L2", True),
    "accuracy, size": ("size_mb", "drop", "size, MB", "accuracy lost, points of percent", False),
    "accuracy, latency": ("estimate_ms", "drop", "estimated latency, ms", "accuracy lost, points of percent", False),
}
_DIGEST = 12


def figures(row: Row) -> dict[str, float | None]:
    """The figures of a cell that held: relative L2, accuracy lost in points of percent, MB, ms on its device."""
    facts = row.get("facts") or {}
    accuracy, reference = facts.get("accuracy"), facts.get("reference_accuracy")
    lost = None if accuracy is None or reference is None else (reference - accuracy) * 100
    return {"drop": lost, **{name: facts.get(name) for name in ("relative_l2", "size_mb", "estimate_ms")}}


def group(row: Row, plane: str) -> str:
    """Within which cells a front is looked for: those of one model, and of one device where latency counts."""
    by_device = PLANES[plane][0] == "estimate_ms"
    return f"{plain(row['model'])}, {plain(row['device'])}" if by_device else plain(row["model"])


def fronts(cells: Sequence[Row]) -> dict[str, list[int]]:
    """By plane: places of the cells on the Pareto front of their group; planes that no cell has figures for are out."""
    found: dict[str, list[int]] = {}
    for plane, (x, y, *_) in PLANES.items():
        groups: dict[str, list[tuple[int, tuple[float, float]]]] = {}
        for i, row in enumerate(cells):
            known = figures(row)
            cost, lost = known[x], known[y]
            if row["state"] == "held" and cost is not None and lost is not None:
                groups.setdefault(group(row, plane), []).append((i, (cost, lost)))
        places = [members[k][0] for members in groups.values() for k in front([point for _, point in members])]
        if places:
            found[plane] = sorted(places)
    return found


def why(row: Row) -> str:
    """Why a cell did not hold, in a sentence."""
    parts = row["error"] or {}
    words = [parts.get("what") or "", *([f"({parts['value']})"] if parts.get("value") else [])]
    reason = f": {parts['why']}" if parts.get("why") else ""
    return plain(" ".join(words) + reason)


def evidence(row: Row) -> str:
    """What a cell's state is made from, in a few words."""
    if row["state"] != "held":
        return why(row)
    facts = row["facts"]
    words = [f"L2 {error(facts.get('relative_l2'))} of {error(facts.get('tolerance'))}"]
    words += [f"{facts['accuracy']:.1%}"] if facts.get("accuracy") is not None else []
    return ", ".join([*words, plain(row["digest"])[:_DIGEST]])


def word(row: Row) -> str:
    """A cell's state, and where it ended."""
    name = STATES[row["state"]][0]
    return f"{name}: {plain(row['stage'])}" if row["state"] == "failed" and row.get("stage") else name


def support(cells: Sequence[Row]) -> Table:
    """The support matrix: models and precisions by targets and devices."""
    places = list(dict.fromkeys((row["target"], row["device"]) for row in cells))
    lines = list(dict.fromkeys((row["model"], row["precision"]) for row in cells))
    known = {((r["model"], r["precision"]), (r["target"], r["device"])): r for r in cells}
    columns = [Column("model"), Column("precision")]
    columns += [Column(plain(target), f"on {plain(device)}" if device else "") for target, device in places]
    rows = []
    for line in lines:
        found = [known.get((line, place)) for place in places]
        rows.append([text(line[0]), text(line[1]), *(_state(row) for row in found)])
    return Table(columns, rows, label="support matrix")


def _state(row: Row | None) -> Cell:
    if row is None:
        return Cell(NONE)
    badge = Badge(word(row), STATES[row["state"]][1], why(row) if row["state"] != "held" else plain(row["bundle"]))
    small = evidence(row) if row["state"] == "held" else ""
    return Cell("", word(row), small, (badge,))


def cells_table(cells: Sequence[Row]) -> Table:
    """Every cell with its figures and the bundle that they are from."""
    columns = [
        Column("#", figure=True),
        Column("cell"),
        Column("state"),
        Column("rel. L2", "", True, "worst of all golden samples, against the training form in float32"),
        Column("allowed", "", True),
        Column("accuracy", "", True, "of the artifact on held-out samples, that of PyTorch below"),
        Column("size", "MB", True),
        Column("parameters", "", True),
        Column("estimate", "ms", True, "uncalibrated, from the device file's peaks"),
        Column("took", "s", True),
        Column("bundle", "", False, "folder, and digest of its manifest"),
    ]
    rows, searched = [], []
    for i, row in enumerate(cells, 1):
        facts, values = row.get("facts") or {}, figures(row)
        accuracy, reference = facts.get("accuracy"), facts.get("reference_accuracy")
        parameters = facts.get("parameters")
        rows.append(
            [
                Cell(str(i), i),
                Cell(plain(row["label"]), plain(row["label"]), badges=_marks(row)),
                Cell("", word(row), badges=(Badge(word(row), STATES[row["state"]][1]),)),
                figure(values["relative_l2"], error),
                figure(facts.get("tolerance"), error),
                Cell(_percent(accuracy), accuracy, "" if accuracy is None else f"PyTorch {_percent(reference)}"),
                figure(values["size_mb"]),
                Cell(NONE if parameters is None else f"{parameters:,}", parameters),
                figure(values["estimate_ms"]),
                figure(row.get("seconds")),
                text(row.get("bundle", ""), f"sha256 {plain(row['digest'])[:16]}" if row.get("digest") else ""),
            ]
        )
        searched.append(f"{plain(row['label'])} {word(row)}".lower())
    return Table(columns, rows, searched, "cells")


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2%}"


def _marks(row: Row) -> tuple[Badge, ...]:
    """What must be known of a cell that held."""
    facts = row.get("facts") or {}
    found = [Badge("random weights", "warn", "nothing was trained")] if facts.get("weights") == "random" else []
    found += [Badge("unproven", "info", plain(facts["unproven"]))] if facts.get("unproven") else []
    return tuple(found)


def reasons(cells: Sequence[Row], *states: str) -> Table | None:
    """Why cells are in one of those states, and what to do; None if no cell is."""
    found = [row for row in cells if row["state"] in states]
    if not found:
        return None
    columns = [Column("cell"), Column("state"), Column("why"), Column("what to do")]
    rows = []
    for row in found:
        details = "; ".join(map(plain, (row["error"] or {}).get("details", [])[:3]))
        fix = plain((row["error"] or {}).get("fix") or "")
        reason = why(row) + (f" ({details})" if details else "")
        state = Cell("", word(row), badges=(Badge(word(row), STATES[row["state"]][1]),))
        rows.append([text(row["label"]), state, text(reason), text(fix)])
    return Table(columns, rows, label="reasons")


def front_table(cells: Sequence[Row], found: Mapping[str, Sequence[int]]) -> Table:
    """The cells that are on a front, and on which."""
    members = sorted({place for places in found.values() for place in places})
    columns = [Column("cell"), Column("on the front of")]
    columns += [Column("rel. L2", "", True), Column("accuracy lost", "points", True)]
    columns += [Column("size", "MB", True), Column("estimate", "ms", True)]
    rows = []
    for place in members:
        values = figures(cells[place])
        on = "; ".join(plane for plane, places in found.items() if place in places)
        lost = values["drop"]
        rows.append(
            [
                text(cells[place]["label"]),
                text(on),
                figure(values["relative_l2"], error),
                Cell(NONE if lost is None else f"{lost:.2f}", lost),
                figure(values["size_mb"]),
                figure(values["estimate_ms"]),
            ]
        )
    return Table(columns, rows, label="fronts").trimmed()


def html(data: Mapping[str, Any]) -> str:
    """One file with everything.

    Raises:
        ToolchainMissing: jinja2 or plotly is not installed.
    """
    return render(page(data))


def page(data: Mapping[str, Any]) -> Page:
    """What is shown, in order."""
    cells: list[Row] = data["cells"]
    found = fronts(cells)
    sections = [
        Section(
            "support",
            "Support",
            "Held: exported here, and the numbers are within what is allowed; below are the worst relative L2 of "
            "what is allowed, the accuracy on held-out samples, and the beginning of the bundle's digest.",
            table=support(cells),
        )
    ]
    if table := reasons(cells, "failed"):
        sections.append(Section("failed", "Failed", "At which stage, why, and what to do.", table=table))
    if found:
        words = (
            "Cells that held; full circles and the dotted line are the front of a model: nothing else of it, on the "
            "same device where latency counts, is as good in both and better in one. Latencies are uncalibrated "
            "estimates from the device's documented peaks. An error of nothing stands at the bottom."
        )
        choices = tuple((plane, plane) for plane in found)
        made = front_table(cells, found)
        sections.append(Section("fronts", "Pareto fronts", words, table=made, chart="fronts", choices=choices))
    words = "All cells. The filter holds for the chart, too."
    sections.append(Section("cells", "Cells", words, table=cells_table(cells).trimmed(), filtered=True))
    if table := reasons(cells, "toolchain", "unsupported"):
        words = "Found without running anything: what a target cannot hold, a device does not run, or is not installed."
        sections.append(Section("unsupported", "Not to be had here", words, table=table))
    return Page(
        title=f"Sweep {plain(data['name'])}",
        lead=f"{count(len(cells), 'cell')}, {plain(data['created'])[:19].replace('T', ' ')}, "
        f"EdgeAttn {plain(data['edgeattn'])}.",
        facts=_facts(cells),
        notes=_notes(cells),
        sections=sections,
        data={
            "records": [_point(row, i, found) for i, row in enumerate(cells)],
            "metrics": [],
            "planes": list(found),
            "axes": {
                plane: {"x": x, "y": y, "x_title": x_title, "y_title": y_title, "logarithmic": logarithmic}
                for plane, (x, y, x_title, y_title, logarithmic) in PLANES.items()
            },
        },
        foot="Times in ms, sizes in MB of 1e6 bytes. This file holds everything that it shows and connects to nothing.",
    )


def _facts(cells: Sequence[Row]) -> list[tuple[str, str, str]]:
    found = []
    for state, (name, kind) in STATES.items():
        number_of = sum(row["state"] == state for row in cells)
        if number_of or state in ("held", "failed"):
            loud = kind if number_of and kind in ("bad", "warn") else ""
            found.append((name, str(number_of), loud))
    return [("cells", str(len(cells)), ""), *found]


def _notes(cells: Sequence[Row]) -> list[str]:
    random = [row for row in cells if (row.get("facts") or {}).get("weights") == "random"]
    if not random:
        return []
    return [f"{count(len(random), 'cell')} with random weights: nothing was trained, so their outputs mean nothing."]


def _point(row: Row, place: int, found: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One cell's part in the chart; one that did not hold has no figures."""
    values = figures(row) if row["state"] == "held" else dict.fromkeys(figures({}))
    lost = values["drop"]
    return {
        "name": plain(row["label"]),
        "short": f"{plain(row['target'])} {plain(row['precision'])}",
        "searched": f"{plain(row['label'])} {word(row)}".lower(),
        "groups": {plane: group(row, plane) for plane in PLANES},
        "fronts": [plane for plane, places in found.items() if place in places],
        "words": {
            "relative_l2": error(values["relative_l2"]),
            "drop": NONE if lost is None else f"{lost:.2f}",
            "size_mb": number(values["size_mb"]),
            "estimate_ms": number(values["estimate_ms"]),
        },
        **{name: short(value) for name, value in values.items()},
    }


def markdown(data: Mapping[str, Any]) -> str:
    """The same as Markdown, fit for a comment on GitHub: support matrix, what failed, fronts."""
    cells: list[Row] = data["cells"]
    counts = ", ".join(f"{value} {name}" for name, value, _ in _facts(cells)[1:])
    parts = [f"## Sweep {escape(data['name'])}: {count(len(cells), 'cell')}, {counts}", ""]
    parts += [*(f"> {note}\n" for note in _notes(cells)), as_markdown(support(cells)), ""]
    later = [("Failed", reasons(cells, "failed"))]
    found = fronts(cells)
    later += [("Pareto fronts", front_table(cells, found))] if found else []
    later += [("Not to be had here", reasons(cells, "toolchain", "unsupported"))]
    for title, table in later:
        if table is None:
            continue
        part = [f"### {title}", "", as_markdown(table), ""]
        if sum(map(len, parts)) + sum(map(len, part)) > MOST:
            parts += [f"{title}: {count(len(table.rows), 'row')}, left away since a comment would be too long.", ""]
        else:
            parts += part
    return "\n".join(parts)
