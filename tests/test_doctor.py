"""The doctor: sound where everything is there, and each thing that can break is told with how to mend it."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from concept_unlearn.cli import app
from concept_unlearn.doctor import Diagnosis, Finding, diagnose, diagnosis, installation, models, storage
from concept_unlearn.doctor.installation import declared
from concept_unlearn.doctor.machine import machine
from concept_unlearn.doctor.storage import Place
from concept_unlearn.lm.embedded import EMBEDDED, cache_dir

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def named(findings, name):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    return tmp_path / "cache"


def test_here_nothing_is_broken_and_every_part_is_looked_at():
    found = diagnose()
    assert found.sound, found.broken
    assert [*dict.fromkeys(f.group for f in found.findings)] == [
        "installation", "imports", "extras", "machine", "models", "folders",
    ]  # fmt: skip
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found


def test_looking_changes_nothing(cache):
    modules = set(sys.modules)
    diagnose(fast=True)
    assert not cache.exists()
    assert not {"sae_lens", "transformer_lens"} & (set(sys.modules) - modules)


class TestInstallation:
    def test_each_requirement_of_the_project_is_a_finding(self):
        names = {f.name for f in installation.installation()}
        assert names == {"python", "concept-unlearn"} | {Requirement(line).name for line in PROJECT["dependencies"]}
        assert {f.name for f in installation.extras()} == set(PROJECT["optional-dependencies"])

    @pytest.mark.parametrize("version", ["6.49.0", "7.0.0", None])
    def test_a_version_out_of_bounds_or_none_is_broken_and_pip_mends_it(self, version, monkeypatch):
        real = metadata.version

        def other(name):
            if name != "sae-lens":
                return real(name)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", other)
        found = named(installation.installation(), "sae-lens")
        assert found.state == "broken"
        assert (version or "not installed") in found.found
        assert found.mend == "pip install 'sae-lens<7,>=6.50'"

    def test_an_old_interpreter_is_broken(self, monkeypatch):
        monkeypatch.setattr("platform.python_version", lambda: "3.10.2")
        found = named(installation.installation(), "python")
        assert (found.state, found.found) == ("broken", "3.10.2; wanted: >=3.11")

    def test_a_package_that_cannot_be_imported_is_broken(self, monkeypatch):
        real = installation.importlib.import_module

        def fails(name):
            if name == "peft":
                raise OSError("undefined symbol: x\nmore")
            return real(name)

        monkeypatch.setattr(installation.importlib, "import_module", fails)
        (found,) = installation.imports()
        assert (found.name, found.state) == ("peft", "broken")
        assert found.found == "import peft: OSError: undefined symbol: x"

    def test_a_missing_extra_is_a_note_with_its_pip_line(self, monkeypatch):
        real = metadata.version

        def without_gguf(name):
            if name == "gguf":
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", without_gguf)
        found = named(installation.extras(), "demo")
        assert (found.state, found.mend) == ("note", "pip install 'gguf>=0.17'")

    @pytest.mark.parametrize("beside", [None, "[tool.ruff]", '[project]\nname = "other"'])
    def test_without_a_checkout_the_metadata_says_what_is_asked_for(self, beside, tmp_path):
        if beside is not None:
            (tmp_path / "pyproject.toml").write_text(beside)
        from_metadata = declared(tmp_path / "pyproject.toml")
        assert from_metadata.python == PROJECT["requires-python"]
        assert "torch" in {r.name for r in from_metadata.always}
        assert not {"pytest", "gguf"} & {r.name for r in from_metadata.always}
        assert "gguf" in {r.name for r in from_metadata.extras["demo"]}
        assert all(r.marker is None for r in from_metadata.extras["demo"])

    def test_a_folder_that_was_never_installed_is_told(self, monkeypatch):
        def nothing(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "distribution", nothing)
        (found,) = installation.installation()
        assert (found.state, found.mend) == ("broken", "pip install -e .")


class TestModels:
    def test_not_fetched_is_a_note_that_says_how(self, cache):
        (found,) = models.models()
        assert (found.state, found.mend) == ("note", "concept-unlearn fetch smollm2")

    def test_fetched_is_fine_and_half_of_it_is_broken(self, cache):
        folder = EMBEDDED["smollm2"].folder
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (found,) = models.models()
        assert found.state == "broken"
        assert found.mend.endswith("concept-unlearn fetch smollm2")
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).touch()
        (found,) = models.models()
        assert found.state == "ok"


class TestFolders:
    def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(self, tmp_path):
        found = storage.look(Place("scratch", tmp_path / "a" / "b", "TMPDIR", needed=True))
        assert found.state == "ok"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("needed", "state"), [(True, "broken"), (False, "note")])
    def test_where_nothing_can_be_written_is_told_with_the_variable(self, tmp_path, needed, state):
        (tmp_path / "file").touch()
        found = storage.look(Place("cache", tmp_path / "file", "CONCEPT_UNLEARN_CACHE", needed=needed))
        assert found.state == state
        assert "CONCEPT_UNLEARN_CACHE" in found.mend

    def test_a_full_disk_is_a_note(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
        assert storage.look(Place("cache", tmp_path, "HF_HOME", needed=True)).state == "note"

    def test_the_cache_is_needed_only_until_the_model_is_there(self, cache):
        cache.touch()  # a file where a folder should be
        assert named(storage.storage(), "embedded models").state == "broken"
        assert cache_dir() == cache


class TestMachine:
    def test_a_device_that_does_not_compute_is_broken(self, monkeypatch):
        def fails(*_, **__):
            raise RuntimeError("no kernel image is available\nmore")

        monkeypatch.setattr(torch, "ones", fails)
        found = named(machine(), "device")
        assert found.state == "broken"
        assert found.found.endswith("no kernel image is available")

    def test_more_threads_than_cores_are_a_note(self, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
        assert named(machine(), "threads").state == "note"

    def test_a_part_that_cannot_be_looked_at_is_broken_and_the_others_are_told(self, monkeypatch):
        def fails():
            raise PermissionError("no\nmore")

        monkeypatch.setattr(diagnosis, "machine", fails)
        found = diagnose(fast=True)
        assert named(found.broken, "machine").found == "PermissionError: no"
        assert "folders" in {f.group for f in found.findings}


class TestVerb:
    def diagnosed(self, monkeypatch, *findings):
        monkeypatch.setattr("concept_unlearn.doctor.diagnose", lambda *, fast: Diagnosis(findings=findings))

    @pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("broken", 1)])
    @pytest.mark.parametrize("flags", [[], ["--json"]])
    def test_exit_code_1_says_that_something_needed_is_broken(self, state, code, flags, monkeypatch):
        finding = Finding(group="a", name="b", state=state, found="[c]", mend="pip install 'd[e]>=1'")
        self.diagnosed(monkeypatch, finding)
        result = CliRunner().invoke(app, ["doctor", *flags])
        assert result.exit_code == code
        if flags:
            assert json.loads(result.stdout) == {"sound": not code, "findings": [finding.model_dump()]}
        else:
            assert "[c]" in result.stdout
            assert "pip install 'd[e]>=1'" in result.stdout
