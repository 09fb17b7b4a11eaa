"""``edgeattn.toml``: cells, budgets, lines, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeattn.check.file import read
from edgeattn.check.init import write
from edgeattn.core.errors import UsageError
from tests.check.making import one, wanted


def test_targets_precisions_and_devices_are_multiplied_where_they_fit(tmp_path: Path) -> None:
    text = """
[models.net]
model = "fmvit-digits"
targets = ["onnx", "coreml"]
precisions = ["fp32", "fp16"]
devices = ["raspberry-pi-5", "iphone-15-pro"]
"""
    assert [cell.id for cell in wanted(tmp_path, text)] == [
        "net onnx fp32 raspberry-pi-5",
        "net onnx fp16 raspberry-pi-5",
        "net coreml fp32 iphone-15-pro",
        "net coreml fp16 iphone-15-pro",
    ]


def test_without_targets_it_is_the_devices_best_or_onnx(tmp_path: Path) -> None:
    found = wanted(tmp_path, '[models.a]\nmodel = "x"\n[models.b]\nmodel = "x"\ndevices = ["iphone-15-pro"]\n')
    assert [cell.id for cell in found] == ["a onnx fp32", "b coreml fp32 iphone-15-pro"]


def test_a_models_budgets_come_first_key_by_key_and_each_has_its_line(tmp_path: Path) -> None:
    text = """[models.a]
model = "x"
precisions = ["fp32", "fp16"]
[models.a.budgets]
size_mb = 1
numerics = { fp16 = 0.1 }
[budgets]
size_mb = 5.0
nodes = 7
numerics = { fp32 = 0.2 }
"""
    fp32, fp16 = wanted(tmp_path, text)
    assert (fp32.budgets.size_mb, fp32.budgets.nodes) == (1.0, 7)
    assert (fp32.cell.tolerance, fp16.cell.tolerance) == (0.2, 0.1)
    assert fp32.place("size_mb").line == 5
    assert fp32.place("nodes").line == 9
    assert fp32.place("numerics", "fp32").line == 10
    assert fp16.place("numerics", "fp16").line == 6
    assert fp32.place("lint").line == 1, "what nobody asks for is the model's"


def test_a_models_latency_budget_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    text = '[models.a]\nmodel = "x"\n[models.a.budgets.latency]\nthreads = 2\n[budgets.latency]\nmargin = 0.1\n'
    (cell,) = wanted(tmp_path, text)
    assert cell.budgets.latency is not None
    assert (cell.budgets.latency.threads, cell.budgets.latency.margin) == (2, 0.1)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[models.a]\nmodel = "x"\n[budgets]\nsize = 1\n', 4, "size_mb"),
        ('[models.a]\nmodel = "x"\n[models.a.budgets]\nmax_fallback = 2.0\n', 4, "max_fallback"),
        ('[models.a]\nmodel = "x"\nprecision = ["fp32"]\n', 3, "precisions"),
        ('[models."v1.2"]\nmodel = "x"\nprecision = ["fp32"]\n', 3, "precisions"),
        ('[models.a]\nmodel = "x"\n[budgets]\nnumerics = { fp33 = 1.0 }\n', 4, "fp33"),
        ('[models.a]\nmodel = "x"\n[budgets.growth]\nspeed = 1.0\n', 3, "speed"),
        ('[models.a]\nmodel = "x"\n\n[models.b]\nmodel = "x"\ntargets = ["onx"]\n', 4, "onnx"),
        ('[models.a]\nmodel = "x"\ntargets = ["coreml"]\ndevices = ["raspberry-pi-5"]\n', 1, "raspberry-pi-5"),
        ('[models."../up"]\nmodel = "x"\n', 1, "../up"),
        ('[models.a]\ntargets = ["onnx"]\n', 1, "missing"),
        ('[models.a]\nmodel = "x"\nprecisions = ["fp32", "fp33"]\n', 3, "fp33"),
        ('[models.a]\nmodel = "x"\ntargets = ["onnx", "onnx"]\n', 3, "twice"),
        ('[models.a]\nmodel = "x"\nargs = { since = 2024-01-01 }\n', 3, "finite numbers"),
        ('[models.a]\nmodel = "x"\nargs = { x = nan }\n', 3, "finite numbers"),
        ('[models.a]\nmodel = "x"\n[budgets]\nnumerics = { fp32 = inf }\n', 4, "from 0 on"),
        ('[models.a]\nmodel = "x"\nlayout = \n', 3, "not TOML"),
    ],
)
def test_what_is_wrong_has_a_line_and_says_what_would_do(text: str, line: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        wanted(tmp_path, text)
    assert (caught.value.where or "").startswith(f"edgeattn.toml:{line}"), caught.value
    assert words in str(caught.value)


def test_no_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "edgeattn.toml", "edgeattn.toml")
    assert "--init" in (caught.value.fix or "")


def test_init_writes_a_file_that_reads_back_and_keeps_one_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "edgeattn.toml"
    write(file, "fmvit-digits", ())
    (cell,) = wanted(tmp_path, file.read_text())
    assert cell.id == "fmvit-digits onnx fp32"
    # Every commented budget is a real one.
    text = file.read_text()
    for line in text[text.index("[budgets]") :].splitlines():
        if line.startswith("# ") and ("=" in line or line.startswith("# [")):
            text = text.replace(line, line[2:])
    (cell,) = wanted(tmp_path, text)
    assert cell.budgets.latency is not None
    assert cell.budgets.growth == {"size_mb": 0.02, "nodes": 0.0}
    file.write_text("mine")
    with pytest.raises(UsageError, match="already"):
        write(file, "fmvit-digits", ())
    assert file.read_text() == "mine"


def test_init_for_a_guest_has_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my net.py").write_text("from torch import nn\ndef build():\n    return nn.ReLU()\n")
    with pytest.raises(UsageError, match="inputs"):
        write(tmp_path / "edgeattn.toml", "my net.py:build", ())
    assert not (tmp_path / "edgeattn.toml").exists()
    write(tmp_path / "edgeattn.toml", "my net.py:build", ["x=1x3"])
    (cell,) = wanted(tmp_path, (tmp_path / "edgeattn.toml").read_text())
    assert (cell.cell.model, cell.cell.inputs) == ("my net.py:build", ("x=1x3",))


def test_one_makes_what_the_other_tests_count_on(tmp_path: Path) -> None:
    assert one(tmp_path, "size_mb = 1.0").place("size_mb").line == 5
