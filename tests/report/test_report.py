"""``edgeattn report``: what is in a report, its files and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgeattn.cli import main
from edgeattn.profile.record import Breakdown, Memory, Record, read, to_json
from edgeattn.report.records import page as pages
from edgeattn.report.records.charts import KEPT, detail, evenly, overview
from edgeattn.report.records.html import page
from edgeattn.report.records.markdown import MOST, escape, markdown
from edgeattn.report.records.tables import numerics_table, summary
from edgeattn.report.records.words import caveats, drop, error, fallback, merge, names, number, score
from tests.cli.test_help import probe
from tests.report.making import many, realistic, record


def saved(path: Path, records: list[Record]) -> str:
    path.write_text(to_json(records))
    return str(path)


def run(*arguments: str) -> int:
    """Exit code of the command line in this process."""
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert run("report", saved(tmp_path / "a.json", realistic()), "-o", str(out)) == 0
    text = out.read_text()
    head = text[: text.index("<script>")]
    assert not re.search(r"<(link|img|iframe|script)[^>]*(src|href)=\"(?!data:,)", head)
    assert 'http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;; script-src &#39;sha256-' in head
    assert "plotly.js v" in text
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = realistic()
    file, twice = saved(tmp_path / "a.json", records), saved(tmp_path / "b.json", records[:3])
    assert run("report", file, twice, "-o", str(tmp_path / "all.json")) == 0
    assert read(tmp_path / "all.json") == records
    assert run("report", file, "-o", str(tmp_path / "r.md")) == 0
    text = (tmp_path / "r.md").read_text()
    assert "| 5 | fmvit-s | tflite | w8a8 | raspberry-pi-5 |" in text
    assert "**uncalibrated estimate**" in text
    assert "throttled: soft temperature limit" in text
    assert "numbers on the neural engine: proven with our interpreter on the CPU" in text
    assert "the numbers are over the tolerance" in text
    assert text.count("<details>") == len(records)
    assert "10 records" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["report.pdf", "report", ".html"])
def test_another_suffix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = saved(tmp_path / "a.json", [record()])
    assert run("report", file, "-o", str(tmp_path / name)) == 2
    assert "or .md or .json" in capsys.readouterr().err


def test_files_that_are_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    changed = json.loads(to_json([record()]))
    changed["records"][0]["latency"]["p50"] = 1.0
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    (tmp_path / "text.json").write_text("no")
    for name, said in (("none.json", "cannot be read"), ("text.json", "not JSON"), ("changed.json", "was changed")):
        assert run("report", str(tmp_path / name), "-o", str(out)) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_page_without_plotly_names_the_line_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    file = saved(tmp_path / "a.json", [record()])
    assert run("report", file, "-o", str(tmp_path / "report.html")) == 3
    assert "pip install 'edgeattn[report]'" in capsys.readouterr().err
    assert run("compare", file, file, "-o", str(tmp_path / "compare.html")) == 3
    assert run("report", file, "-o", str(tmp_path / "report.md")) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", saved(tmp_path / "a.json", [record()]), "-o", "/proc/none/report.md") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report", "compare"])
def test_help_is_light(name: str) -> None:
    loaded = probe([name, "--help"])
    assert loaded["code"] == 0
    assert not {"torch", "numpy", "pydantic", "rich", "plotly", "jinja2"} & set(loaded["modules"])


def test_parts_without_data_are_left_away() -> None:
    bare = record(None, breakdown=Breakdown(), fused=0, numerics={}, worst_relative_l2=None, accuracy=None, unproven="")
    assert [s.id for s in page([bare]).sections] == ["summary", "caveats", "origin"]
    table = summary([bare], ["x"])
    assert "p50" not in [column.name for column in table.columns]
    assert {s.id for s in page(realistic()).sections} == {
        *("summary", "caveats", "latency", "pareto", "memory", "times", "fallback", "proof", "reparam", "lint"),
        *("origin", "operations", "treemap", "roofline", "quantized", "runs", "states", "ops-table", "numerics"),
    }


def test_estimates_are_called_so_and_have_no_distribution() -> None:
    estimated = realistic()[-1]
    assert caveats(estimated)[0][0] == "uncalibrated estimate"
    assert overview(estimated, "x")["values"] == []
    row = summary([estimated], ["x"]).rows[0]
    assert [badge.text for badge in row[1].badges] == ["uncalibrated estimate", "unproven"]
    assert any(cell.text.startswith("≈") and cell.small == "estimate" for cell in row)


def test_flags_partial_and_random_weights_are_badges() -> None:
    odd = record(flags=("throttled: hot",), partial="killed", weights="random", worst_relative_l2=1.0)
    badges = {badge.text: badge for badge in summary([odd], ["x"]).rows[0][1].badges}
    assert list(badges) == ["partial", "random weights", "over tolerance", "throttled"]
    assert badges["partial"].title == "killed"
    assert badges["over tolerance"].kind == "bad"


def test_records_count_once_and_have_names_of_their_own() -> None:
    one, other = record(), record(created="2026-11-26T09:30:00Z")
    assert merge([[one, other], [one]]) == [one, other]
    same = record(6.0)
    assert len(set(names([one, other, same]))) == 3
    assert names([one]) == ["fmvit-s.onnx.fp32, 4 threads"]
    assert names([one, record(device="b")])[1] == "fmvit-s.onnx.fp32, 4 threads on b"


def test_figures() -> None:
    assert [number(v) for v in (None, 0, 0.01234, 3.14159, 31.4159, 314.159, 31415.9)] == [
        *("–", "0", "0.0123", "3.14", "31.4", "314", "31,416")
    ]
    assert (error(None), error(4.24e-6), error(0.1234)) == ("–", "4.2e-06", "0.12")
    assert (score(0.9694, "top-1"), drop(0.96, 0.97, "top-1")) == ("96.94%", "-1.00 points")
    assert (score(0.9, "perplexity"), drop(12.5, 12.0, "perplexity")) == ("0.9", "+0.5")
    units = {"cpu": {"ops": 10.0, "time": 4.0}, "gpu": {"ops": 1.0, "time": 0.5}}
    assert fallback(record(breakdown=Breakdown(wanted="ne", fallback=units))) == 4.5
    assert fallback(record(breakdown=Breakdown(wanted="ne"))) == 0
    assert fallback(record()) is None
    assert evenly(list(map(float, range(1000))), 5) == [0, 250, 500, 749, 999]


def test_distributions_are_cut_at_even_ranks() -> None:
    made = record(5.0)
    values = overview(made, "x")["values"]
    assert len(values) == KEPT
    assert made.latency is not None
    assert (values[0], values[-1]) == pytest.approx((made.latency.min, made.latency.max), rel=1e-4)


def test_numerics_have_the_furthest_off_first_and_values_that_are_not_finite_before_all() -> None:
    outputs = {
        name: {"relative_l2": l2, "sqnr_db": 1.0, "max_abs": 1.0, "cosine": 1.0}
        for name, l2 in (("a", 0.1), ("b", None), ("c", 0.2))
    }
    table = numerics_table(record(numerics={"s": outputs, "odd": 3}))
    assert table is not None
    assert [row[1].text for row in table.rows] == ["b", "c", "a"]
    assert detail(record(numerics={}), "x")["numerics"] is None


def test_memory_and_sizes_are_in_the_table() -> None:
    table = summary([record(memory=Memory(peak_rss_mb=91.0, device_mb=12.0))], ["x"])
    assert any((cell.text, cell.small) == ("91.0", "+ 12.0 on it") for cell in table.rows[0])


def test_a_comment_stays_below_what_github_takes() -> None:
    text = markdown(many(100))
    assert len(text) < MOST + 200
    assert "a comment would be too long" in text


def test_markdown_has_no_markup_of_names() -> None:
    assert escape("a|b<c>*d*`e`@f") == "a\\|b&lt;c&gt;\\*d\\*\\`e\\`@<!-- -->f"


def test_the_policy_allows_this_pages_scripts_alone() -> None:
    assert "sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=" in pages._policy(["abc"])
