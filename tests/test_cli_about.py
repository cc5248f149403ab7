"""The verbs that say what there is, silence, and completion."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from concept_unlearn.catalogue import catalogue, first_line
from concept_unlearn.cli import app
from concept_unlearn.component import Component
from concept_unlearn.errors import UnknownName
from concept_unlearn.methods import PRESETS, Method


def shell(*arguments, **settings):
    result = CliRunner().invoke(app, [*arguments], **settings)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def families():
    def below(cls):
        return {cls} | {c for child in cls.__subclasses__() for c in below(child)}

    return {c for c in below(Component) if c._family and c.__module__.startswith("concept_unlearn.")}


def test_every_name_has_a_line_of_what_it_is():
    foreign = {k for f in families() for k, m in f.members.items() if not m.__module__.startswith("concept_unlearn.")}
    for family, members in catalogue().items():
        assert members, family
        assert not [name for name, line in members.items() if name not in foreign and not line], family
        assert not [line for line in members.values() if "\n" in line], family


def test_every_family_of_components_is_listed():
    listed = [set(members) for members in catalogue().values()]
    for family in families():
        assert any(set(family.members) <= names for names in listed), family


def test_the_line_is_the_first_of_the_docstring_without_marks():
    assert first_line(type("X", (), {"__doc__": "Sets ``a`` to b.\n\nMore."})) == "Sets a to b."
    assert first_line(type("X", (), {})) == ""


def test_a_preset_is_shown_as_it_would_stand_in_a_config():
    assert {name: yaml.safe_load(line) for name, line in catalogue()["presets"].items()} == PRESETS


def test_list_has_a_line_for_each_name_also_in_a_narrow_pipe():
    lines = shell("list", env={"COLUMNS": "40"}).splitlines()
    assert len(lines) == sum(1 + len(members) for members in catalogue().values())


def test_list_of_one_family_holds_that_alone():
    lines = shell("list", "methods").splitlines()
    assert lines[0] == "methods"
    assert {line.split()[0] for line in lines[1:]} == set(Method.members)
    with pytest.raises(UnknownName, match=r"no family named 'methdos'.*Did you mean 'methods'"):
        shell("list", "methdos")


@pytest.mark.parametrize("family", [None, "gates"])
def test_list_as_json_is_the_catalogue(family):
    said = json.loads(shell("list", *([family] if family else []), "--json"))
    assert said == {name: members for name, members in catalogue().items() if family in (None, name)}


def test_quiet_says_nothing_but_data_and_only_for_that_call():
    assert shell("--quiet", "list", "gates") == ""
    assert json.loads(shell("-q", "list", "gates", "--json"))
    assert "always" in shell("list", "gates")


def test_of_several_processes_only_the_first_talks():
    assert shell("list", "gates", env={"RANK": "1"}) == ""
    assert shell("list", "gates", env={"RANK": "0"}) != ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("do", "doctor"),
        ("list met", "methods"),
        ("list met", "metrics"),
        ("show np", "npo_kl"),
        ("doctor --f", "--fast"),
    ],
)
def test_the_shell_completes_verbs_options_families_and_presets(typed, offered):
    words = f"concept-unlearn {typed}"
    said = shell(
        prog_name="concept-unlearn",
        env={
            "_CONCEPT_UNLEARN_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
    )
    assert offered in said.split()


def test_completion_can_be_installed():
    assert "--install-completion" in shell("--help")
