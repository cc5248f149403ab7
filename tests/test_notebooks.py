"""Notebooks are stored as nobody has run them yet, say what they need, and only call what there is.

Running them is ``make notebooks``.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import concept_unlearn as cu

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}


def source(cell):
    return "".join(cell["source"])


def code(notebook):
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook):
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def test_they_are_numbered_in_the_order_in_which_they_are_read():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_is_stored_without_outputs_and_counts(name):
    for cell in NOTEBOOKS[name]["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_begins_with_a_title_and_what_it_needs(name):
    first = prose(NOTEBOOKS[name])[0]
    assert first.startswith("# ")
    assert "pip install -e '.[demo,notebooks]'" in first
    assert "concept-unlearn fetch smollm2" in first


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_name_it_takes_from_the_package_is_public(name):
    tree = ast.parse("\n".join(code(NOTEBOOKS[name])))
    taken = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cu"
    }
    assert taken
    assert not {one for one in taken if not hasattr(cu, one)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_link_to_a_file_leads_to_one(name):
    links = [link for text in prose(NOTEBOOKS[name]) for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in links:
        assert link.startswith("https://") or (FOLDER / link).is_file(), link


def test_every_one_that_a_page_names_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"notebooks/([\w.]+\.ipynb)", page.read_text()):
            assert name in NOTEBOOKS, f"{page.name}: {name}"
