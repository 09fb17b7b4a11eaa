"""The pages in Chromium: charts are drawn, names are text, tables sort, colours follow, nothing is fetched."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from edgeattn.profile.record import Breakdown
from edgeattn.report.records import compare_html
from edgeattn.report.records.compare import compare
from edgeattn.report.records.html import html
from edgeattn.report.records.words import plain
from tests.report.making import many, odd, operations, realistic, record
from tests.report.test_escaping import NASTY, hostile


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Opened:
    """A page, and what went wrong or was asked for while it was open."""

    page: Page
    wrong: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def draw_all(self) -> list[str]:
        """Scroll to every chart; names of those that were drawn."""
        for place in self.page.query_selector_all(".chart"):
            place.evaluate("place => place.scrollIntoView()")
            place.evaluate(
                "place => new Promise(done => { const wait = () => place.dataset.drawn ? done() : setTimeout(wait, 20);"
                " wait(); })"
            )
        drawn = self.page.query_selector_all('.chart[data-drawn="yes"]')
        for place in drawn:
            assert place.query_selector(".main-svg"), place.get_attribute("data-chart")
        return [str(place.get_attribute("data-chart")) for place in drawn]

    def check(self) -> None:
        """Nothing went wrong, and nothing but the file itself was asked for."""
        assert self.wrong == []
        assert [url for url in self.requests if not url.startswith(("data:", "blob:"))] == [
            self.page.url.partition("#")[0]
        ]


Open = Callable[..., Opened]


@pytest.fixture
def view(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    contexts = []

    def run(text: str, width: int = 1400, scheme: str = "light") -> Opened:
        file = tmp_path / "page.html"
        file.write_text(text)
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on(
            "console", lambda said: opened.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        opened.page.on("pageerror", lambda error: opened.wrong.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.wrong.append("a dialog"), dialog.dismiss()))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        began = time.monotonic()
        opened.page.goto(file.as_uri(), wait_until="load")
        opened.seconds = time.monotonic() - began
        return opened

    yield run
    for context in contexts:
        context.close()


def compared() -> str:
    before = realistic()
    after = [r.model_copy(update={"created": "2026-11-26T09:30:00Z"}).sealed() for r in before[:-1]]
    after[0] = record(5.5, 77, model="fmvit-t", breakdown=Breakdown(operations=operations(7.0)))
    return compare_html.html(compare(before, after))


CHARTS = ["latency", "pareto", "memory", "times", "fallback", "operations", "treemap", "roofline", "runs", "states"]


@pytest.mark.parametrize("width", [1400, 390])
def test_every_chart_is_drawn(view: Open, width: int) -> None:
    opened = view(html(realistic()), width)
    assert opened.draw_all() == CHARTS
    opened.page.select_option("#pick", "1")  # this one was quantized
    assert "quantized" in opened.draw_all()
    opened.page.select_option("#pick", "9")  # and this one is an estimate: it has no runs and no states
    drawn = opened.draw_all()
    assert "operations" in drawn
    assert not {"quantized", "runs", "states"} & set(drawn)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.check()


@pytest.mark.parametrize("width", [1400, 390])
def test_every_chart_of_a_comparison_is_drawn(view: Open, width: int) -> None:
    opened = view(compared(), width)
    assert opened.draw_all() == ["ratios", "overlay", "changes"]
    for choice in ("violin", "ecdf", "histogram"):
        opened.page.select_option("#overlay .choice", choice)
        assert "overlay" in opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.check()


@pytest.mark.parametrize("width", [1400, 390])
def test_odd_records_break_no_chart(view: Open, width: int) -> None:
    records = odd()
    opened = view(html(records), width)
    for index in range(len(records)):
        opened.page.select_option("#pick", str(index))
        assert "latency" in opened.draw_all()
    opened.page.select_option("#pareto .choice", "perplexity")
    assert "pareto" in opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.check()
    pairs = view(compare_html.html(compare(records, records)), width)
    for index in range(len(pairs.page.query_selector_all("#pick option"))):
        pairs.page.select_option("#pick", str(index))
        pairs.draw_all()
    pairs.check()


def test_what_a_select_offers_can_be_drawn(view: Open) -> None:
    opened = view(html(realistic()))
    for select in opened.page.query_selector_all(".choice"):
        for option in select.query_selector_all("option"):
            select.select_option(option.get_attribute("value"))
            assert opened.draw_all() == CHARTS
    opened.page.select_option("#operations .choice", "kind")
    opened.draw_all()
    texts = opened.page.query_selector_all("#operations .ytick text")
    assert {text.text_content() for text in texts} >= {"Conv", "MatMul", "Softmax"}
    opened.check()


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_in_charts(view: Open, name: str) -> None:
    opened = view(html([hostile(name), record()]))
    opened.draw_all()
    body = opened.page.evaluate("document.querySelector('main').textContent")
    assert plain(name) in body
    shown = opened.page.evaluate("[...document.querySelectorAll('#operations .ytick text')].map(t => t.textContent)")
    # What Plotly's SVG makes of runs of spaces is not looked at; on an axis, a name is cut where it is too long.
    assert [text.split() for text in shown] == [plain(name).split()]
    assert opened.page.query_selector_all(".main-svg a, .main-svg tspan[style*=bold], main script, main img") == []
    opened.page.evaluate("document.querySelector('[data-chart=operations]').scrollIntoView()")
    bar = opened.page.query_selector("#operations .bars .point path")
    assert bar is not None
    box = bar.bounding_box()
    assert box is not None
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.page.wait_for_selector("#operations .hoverlayer .hovertext")
    hovered = opened.page.evaluate("document.querySelector('#operations .hovertext').textContent")
    assert "".join(plain(name).split()) in "".join(hovered.split())
    opened.check()


def column(opened: Opened, heading: str, table: str = "#summary") -> list[str]:
    return opened.page.evaluate(
        """([table, heading]) => {
          const made = document.querySelector(`${table} table`);
          const at = [...made.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim().startsWith(heading));
          return [...made.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[at].firstChild.textContent);
        }""",
        [table, heading],
    )


def test_tables_sort(view: Open) -> None:
    opened = view(html(realistic()))
    heading = opened.page.locator("#summary th", has_text="p90")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    up = column(opened, "p90")
    assert up[-1] == "–"  # an estimate has none: last in both directions
    assert [float(v) for v in up[:-1]] == sorted(float(v) for v in up[:-1])
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(opened, "p90") == [*reversed(up[:-1]), "–"]
    opened.page.locator("#summary th", has_text="model").locator("button").click()
    assert column(opened, "model")[0] == "convsharevit-v2"
    assert heading.get_attribute("aria-sort") == "none"
    opened.page.locator("#ops-table th", has_text="time").locator("button").click()
    times = [float(v) for v in column(opened, "time", "#ops-table")]
    assert times == sorted(times)
    opened.check()


def test_the_filter_holds_for_table_and_charts(view: Open) -> None:
    opened = view(html(realistic()))
    opened.page.fill("#filter", "iphone FMVIT")
    opened.page.wait_for_timeout(300)
    assert column(opened, "device") == ["iphone-15-pro"] * 2
    opened.draw_all()
    assert len(opened.page.query_selector_all("#memory .ytick")) == 2
    opened.page.fill("#filter", "nothing of this kind")
    opened.page.wait_for_timeout(300)
    assert "memory" not in opened.draw_all()
    opened.page.fill("#filter", "")
    opened.page.wait_for_timeout(300)
    assert opened.draw_all() == CHARTS
    opened.check()


GROUND = "getComputedStyle(document.body).backgroundColor"
TICK = "getComputedStyle(document.querySelector('#memory .xtick text')).fill"


def test_colours_follow_the_system_and_the_button(view: Open) -> None:
    opened = view(html(realistic()))
    opened.draw_all()
    light = [opened.page.evaluate(script) for script in (GROUND, TICK)]
    opened.page.click("#theme")
    dark = [opened.page.evaluate(script) for script in (GROUND, TICK)]
    assert all(a != b for a, b in zip(light, dark, strict=True))
    opened.page.click("#theme")
    assert [opened.page.evaluate(script) for script in (GROUND, TICK)] == light
    system = view(html(realistic()), scheme="dark")
    system.draw_all()
    assert [system.page.evaluate(script) for script in (GROUND, TICK)] == dark
    assert system.page.inner_text("#theme") == "light"


def test_the_modebar_is_small_and_has_no_link(view: Open) -> None:
    opened = view(html(realistic()))
    opened.draw_all()
    assert opened.page.query_selector_all(".modebar-btn--logo, a[href*=plotly]") == []
    assert len(opened.page.query_selector_all("#memory .modebar-btn")) == 2


def test_two_hundred_records_open_at_once(view: Open) -> None:
    opened = view(html(many(200)))
    assert opened.seconds < 3, f"{opened.seconds:.1f} s until it was loaded"
    assert opened.page.evaluate("Number(document.documentElement.dataset.ready)") < 3000
    assert len(opened.page.query_selector_all("#summary tbody tr")) == 200
    assert opened.page.evaluate("document.querySelector('#summary table').getBoundingClientRect().height") > 300
    assert "operations" in opened.draw_all()
    opened.check()
