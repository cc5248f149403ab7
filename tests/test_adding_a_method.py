"""The worked example of docs/adding-a-method.md, word for word: a method from one file, wherever methods are known."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from test_cli import shell
from test_run import config

from concept_unlearn.cli.app import load_module
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.methods import Method

DOC = Path(__file__).parents[1] / "docs" / "adding-a-method.md"
SPEC = "{kind: random_direction, sites: [resid_post.1], n: 2}"


@pytest.fixture
def file(tmp_path):
    """The method is forgotten again afterwards."""
    (code,) = re.findall(r"<!-- file: random_direction.py -->\n```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "random_direction.py").write_text(code)
    yield tmp_path / "random_direction.py"
    Method.members.pop("random_direction", None)
    sys.modules.pop("random_direction", None)


def test_it_is_known_to_the_shell_the_schema_and_the_yaml(file):
    assert "random_direction" not in shell("list")
    assert "random_direction" in shell("--load", file, "list")
    assert '"const": "random_direction"' in shell("schema", "run")
    assert Method.parse({"kind": "random_direction", "sites": ["resid_post.1"]}).n == 1
    with pytest.raises(InvalidConfig, match="random direction has no 'm'; known: sites, n, seed"):
        Method.parse({"kind": "random_direction", "sites": ["resid_post.1"], "m": 3})


def test_it_has_its_rows_in_the_report_once_a_seed(file, workplace, tmp_path):
    settings = ("calibration.grid=2", "compare={}", f"compare.chance={SPEC}", "seeds=[0, 1]")
    overrides = [word for setting in settings for word in ("--set", setting)]
    shell("--load", file, "run", config(workplace, tmp_path / "out"), *overrides)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["entries"]
    assert [(row["name"], row["seed"]) for row in rows if row["name"] == "chance"] == [("chance", 0), ("chance", 1)]
    for page in ("report.html", "table.md"):
        assert "chance" in (tmp_path / "out" / page).read_text()


@pytest.mark.parametrize("given", ["no_such_module", "missing.py"])
def test_what_cannot_be_read_is_an_error_that_says_so(given):
    with pytest.raises(InvalidConfig, match=f"--load {given}"):
        load_module(given)
