"""README and docs: links lead somewhere, commands are commands, and no page is left out of the site."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import concept_unlearn
from concept_unlearn.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
SHELL = typer.main.get_command(app)
OURS = re.compile(r"(?:^|\s)(?:concept-unlearn|-m concept_unlearn)(?=\s|$)")


def site():
    """The hook that makes the pages of the site that are no files."""
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            yield link


def blocks(page):
    """Whole calls in blocks without a language, or of a shell."""
    for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
        if language in ("", "bash", "sh", "shell", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                if found := OURS.search(line):
                    yield line[found.end() :]


def spans(page):
    """Calls within a sentence, which may leave out what is required."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        if found := re.match(r"concept-unlearn\s|accelerate launch -m concept_unlearn\s", span):
            yield span[found.end() :]


def given(call):
    """Arguments without comment, dots, redirection, or what is piped elsewhere."""
    arguments = [a for a in shlex.split(" ".join(call.split()), comments=True) if a != "..."]
    ends = [i for i, a in enumerate(arguments) if a in (">", "|", "&&", ";")]
    return arguments[: ends[0]] if ends else arguments


def parse(call):
    """As the shell would, up to running it."""
    arguments = given(call)
    outer = SHELL.make_context("concept-unlearn", arguments, allow_extra_args=True)
    name, verb, rest = SHELL.resolve_command(outer, [*outer._protected_args, *outer.args])
    return verb.make_context(name, rest, parent=outer)


def options(command):
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert not list(broken(PAGES[name]))


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](page.md) [b](#one-two) [c](https://x.org/y) [d](gone.md) [e](page.md#three)\n")
    assert list(broken(page)) == ["gone.md", "page.md#three"]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_in_a_block_can_be_parsed(name):
    for call in blocks(PAGES[name]):
        if given(call)[-1:] not in (["--install-completion"], ["--help"]):  # these act while they are parsed
            parse(call)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_in_a_sentence_names_a_verb_and_its_options(name):
    for call in spans(PAGES[name]):
        arguments = given(call)
        verbs = [a for a in arguments if a in SHELL.commands or a in ("VERB", "NAME")]
        flags = {a.partition("=")[0] for a in arguments if a.startswith("--") and a != "--"}
        assert verbs or flags <= options(SHELL), call
        known = options(SHELL.commands[verbs[0]]) if verbs and verbs[0] in SHELL.commands else {"--help"}
        assert flags <= known | options(SHELL), call


@pytest.mark.parametrize("call", ["unlern --scope chess", "rank --scop chess --dictionary x", "fit npo --output x"])
def test_a_command_that_is_none_is_seen(call):
    with pytest.raises(Exception, match=r"No such|Missing"):
        parse(call)


def test_the_docs_hold_commands_to_look_at():
    assert sum(len(list(blocks(page))) for page in PAGES.values()) > 30
    assert sum(len(list(spans(page))) for page in PAGES.values()) > 5


@pytest.mark.parametrize("name", PAGES)
def test_every_config_a_page_names_is_there(name):
    for path in re.findall(r"configs/[\w./]*\w", PAGES[name].read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_site_and_every_page_of_the_site_is_there():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(node):
        if isinstance(node, str):
            return [node]
        return [leaf for part in (node.values() if isinstance(node, dict) else node) for leaf in leaves(part)]

    files = {str(page.relative_to(ROOT / "docs")) for page in PAGES.values() if page.name != "README.md"}
    assert sorted(leaves(settings["nav"])) == sorted({"index.md", *files})


def test_the_first_page_is_the_readme_with_links_from_within_docs():
    text = site().first_page()
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert link.startswith("http") or (ROOT / "docs" / link).is_file()


def test_the_api_pages_hold_every_public_name_where_it_is_defined():
    found = {name: path for names in site().exported().values() for name, path in names.items()}
    public = {n for n, v in vars(concept_unlearn).items() if not n.startswith("_") and not hasattr(v, "__path__")}
    assert set(found) <= public | {"PRESETS"}
    assert {n for n in public if getattr(vars(concept_unlearn)[n], "__module__", "").startswith("concept_")} <= set(
        found
    )


def test_an_api_page_begins_with_what_the_room_says_of_itself():
    page = site().api_page("gates", {"Gate": "concept_unlearn.gates.Gate"})
    assert page.startswith("# gates\n\nWhen an edit applies.")
    assert "::: concept_unlearn.gates.Gate" in page
    assert "concept_unlearn.concept_unlearn" not in page
