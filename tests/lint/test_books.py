"""Where rules come from: files, a user's folder, installed packages; what a cached result depends on; the page."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeattn.core.errors import UsageError
from edgeattn.lint import RuleBook
from edgeattn.lint.books import user_books
from edgeattn.lint.engine import all_of
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.stages import STAGES
from examples import lint_table
from tests.lint.test_pattern import RULE
from tests.lint.test_rules import TOKENS, program

RULES = f'{RULE}pattern = {{ op = "softmax" }}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder of rules."""
    monkeypatch.setenv("EDGEATTN_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "lint").mkdir(parents=True)
    return tmp_path / "home" / "lint"


def test_rules_of_the_folder_and_of_a_file_are_looked_for(folder: Path, tmp_path: Path) -> None:
    (folder / "a.toml").write_text(RULES)
    more = tmp_path / "more.toml"
    more.write_text(RULES.replace("mine", "other").replace('mend = "m"', 'mend = "m"\ntargets = ["onnx"]'))
    made = program((nn.Softmax(-1), (TOKENS,)))
    for target, rules in (("onnx", ["mine", "other"]), ("coreml", ["mine"])):
        assert [finding.rule for finding in all_of(made, user_books([more]), target)] == rules


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    for name in ("branch", "mine"):
        (folder / "a.toml").write_text(RULES)
        (folder / "b.toml").write_text(RULES.replace("mine", name))
        with pytest.raises(UsageError, match="two rules have one name") as caught:
            user_books()
        assert caught.value.value == name


def test_a_target_that_there_is_none_of_is_a_mistake(folder: Path) -> None:
    (folder / "a.toml").write_text(RULES.replace('mend = "m"', 'mend = "m"\ntargets = ["onx"]'))
    with pytest.raises(UsageError, match="unknown target") as caught:
        next(stage for stage in STAGES if stage.name == "lint").config(make_job("fmvit-digits"))
    assert "onnx" in (caught.value.fix or "")
    assert "rules.mine.targets" in (caught.value.where or "")


def test_a_package_brings_rules_without_being_run(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rules_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("ours", "rules_of_ours", "edgeattn.lint_rules")
    monkeypatch.setattr("edgeattn.lint.books.entry_points", lambda group: [point])
    with pytest.raises(UsageError, match="cannot be found"):
        user_books()
    (package / "lint.toml").write_text(RULES)
    (book,) = user_books()
    assert list(book.rules) == ["mine"]


def test_a_users_rules_are_part_of_what_a_result_depends_on(folder: Path) -> None:
    (stage,) = [stage for stage in STAGES if stage.name == "lint"]
    job = make_job("fmvit-digits", target="null")
    plain = stage.config(job)
    (folder / "a.toml").write_text(RULES)
    first = stage.config(job)
    (folder / "a.toml").write_text(RULES.replace("note", "error"))
    assert len({str(config["rules"]) for config in (plain, first, stage.config(job))}) == 3
    (folder / "a.toml").write_text("rules = 1")
    with pytest.raises(UsageError):
        stage.config(job)


def test_the_page_is_what_the_script_writes_and_its_example_a_rule(tmp_path: Path) -> None:
    text = lint_table.PAGE.read_text(encoding="utf-8")
    assert text == lint_table.page()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    (tmp_path / "example.toml").write_text(example)
    book = RuleBook(tmp_path / "example.toml", users=True)

    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.transpose(1, 2) @ x * 0.5, -1)

    for size, count in ((4096, 1), (16, 0)):
        assert len(all_of(program((Wide(), (torch.randn(1, 2, size),))), [book], "onnx")) == count
