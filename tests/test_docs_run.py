"""Every block of code in the README and in docs/ does what it says: each page from top to bottom, as a reader would."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import doc_workshop
import huggingface_hub.constants
import pytest
import yaml
from doc_blocks import PAGES, SHOWN, blocks, commands
from typer.testing import CliRunner

import concept_unlearn.catalogue
import concept_unlearn.data.scope
import concept_unlearn.dictionaries.load
from concept_unlearn.cli import app
from concept_unlearn.component import Component
from concept_unlearn.methods import Method
from concept_unlearn.run import Run

pytestmark = pytest.mark.filterwarnings("default")  # what a reader is warned of is no failure of the page
WITH_CODE = [name for name, page in PAGES.items() if any(block.is_run for block in blocks(page.read_text()))]
MIN_REASON = 12


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    root = tmp_path_factory.mktemp("workshop")
    doc_workshop.build(root)
    return root


@pytest.fixture
def home(workshop, tmp_path, monkeypatch):
    """A reader's folder, on a machine that has the model and cannot reach the Hub."""
    for module, name, folder in (
        (concept_unlearn.dictionaries.load, "ASSETS", "dictionaries"),
        (concept_unlearn.catalogue, "ASSETS", "dictionaries"),
        (concept_unlearn.data.scope, "CONCEPTS", "concepts"),
        (concept_unlearn.catalogue, "CONCEPTS", "concepts"),
    ):
        monkeypatch.setattr(module, name, workshop / folder)
    monkeypatch.setenv("CONCEPT_UNLEARN_CACHE", str(workshop / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    doc_workshop.bring(workshop, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kinds(home, monkeypatch):
    """What a page registers and imports is forgotten after it."""
    monkeypatch.syspath_prepend(home)
    families = [family for family in Component.__subclasses__() if hasattr(family, "members")]
    before = [dict(family.members) for family in families]
    yield
    for family, members in zip(families, before, strict=True):
        family.members.clear()
        family.members.update(members)
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(home))]:
        del sys.modules[name]


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_page_can_be_followed_from_top_to_bottom(name, home, kinds):
    reader = Reader()
    for block in blocks(PAGES[name].read_text()):
        if block.is_run:
            try:
                reader.follow(block)
            except Exception as error:
                raise AssertionError(f"{name}:{block.line}: {error}\n{block.code}") from error


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_unrun_without_a_reason(name):
    for block in blocks(PAGES[name].read_text()):
        assert block.is_run or block.language in SHOWN or len(block.not_run or "") > MIN_REASON, block


def test_most_blocks_are_run():
    all_blocks = [block for page in PAGES.values() for block in blocks(page.read_text()) if not block.hidden]
    run = sum(block.is_run for block in all_blocks)
    assert run > 3 * sum(block.not_run is not None for block in all_blocks)
    assert run > 40


class Reader:
    """Types what he reads: Python into one session, commands into one shell's folder."""

    def __init__(self):
        self.session = {"__name__": "__page__"}

    def follow(self, block):
        if block.file is not None:
            Path(block.file).write_text(block.code)
        else:
            getattr(self, block.language)(block.code)

    def python(self, code):
        exec(compile(ast.parse(code), "<page>", "exec"), self.session)

    def sh(self, code):
        for command in commands(code):
            self.command(command)

    def command(self, command):
        words = shlex.split(command, comments=True)
        if words[0] == "concept-unlearn" and not {"|", ">", "&&"} & set(words):
            self.shell([found for word in words[1:] for found in (expanded(word) or [word])])
        elif words[0] == "python" and words[1].endswith(".py"):
            self.script(words[1:])
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)

    @staticmethod
    def shell(words):
        result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
        if result.exit_code:
            said = f"concept-unlearn {shlex.join(words)}\n{result.output}\n{result.exception}"
            raise AssertionError(said) from result.exception

    @staticmethod
    def script(words):
        before = sys.argv
        sys.argv = words
        try:
            runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = before

    @staticmethod
    def yaml(code):
        """A config of a run where it says ``scope:`` or ``settings:``, else a method a line or in all."""
        data = yaml.safe_load(code) if not code.startswith("{") else None
        if data is not None and {"scope", "settings"} & data.keys():
            Run.model_validate(data)
            return
        for spec in [yaml.safe_load(line) for line in commands(code)] if data is None else [data]:
            Method.parse(spec)

    @staticmethod
    def json(code):
        for line in code.splitlines():
            json.loads(line)


def expanded(word):
    return sorted(map(str, Path().glob(word))) if "*" in word else []


def test_comments_say_how_a_block_is_run():
    page = (
        "<!-- not run: takes an hour -->\n```sh\na\n```\n<!-- run with: {b: c, add: --d} -->\n```\nb \\\n  e # f\n```\n"
        "<!-- python\nx = 1\n-->\n```text\nsaid\n```\n"
    )
    a, b, c, d = blocks(page)
    assert (a.not_run, a.is_run, b.code, b.language) == ("takes an hour", False, "c    e --d\n", "sh")
    assert (c.hidden, c.is_run, c.code.strip(), d.is_run, d.line) == (True, True, "x = 1", False, 13)


@pytest.mark.parametrize(
    "page",
    ["```cobol\n```", "<!-- not run: a reason -->\n", "<!-- run with: {b: c} -->\n```sh\na\n```", "<!-- todo: x -->\n"],
)
def test_a_comment_or_language_that_means_nothing_is_an_error(page):
    with pytest.raises(ValueError):
        blocks(page)


def test_a_block_that_fails_is_named(home):
    with pytest.raises(AssertionError, match="no edit named 'zreo'"):
        Reader().sh("concept-unlearn unlearn --scope chess --dictionary x --edit zreo --output y")
