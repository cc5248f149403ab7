"""From a config to a patch and a report; stopped and started again it gives what it would have given."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from concept_unlearn.cli import app
from concept_unlearn.config import load_config
from concept_unlearn.errors import InvalidConfig, InvalidData, SiteNotFound, UnknownName
from concept_unlearn.lm import LM
from concept_unlearn.methods import Steer, Suppress
from concept_unlearn.patches import load_patch
from concept_unlearn.recipe import Recipe
from concept_unlearn.report import Overview, Report
from concept_unlearn.run import Run, execute, load_run
from concept_unlearn.sequence import SequenceRun
from concept_unlearn.training import Loop

pytestmark = pytest.mark.filterwarnings("ignore:no strength of (means|leace) keeps what was asked")

CONFIGS = Path(__file__).parents[1] / "configs"


def config(workplace, output, **changes):
    data = {
        "model": {"name": str(workplace / "model"), "device": "cpu"},
        "scope": str(workplace / "scope"),
        "method": {
            "kind": "suppress", "dictionaries": [str(workplace / "dictionary")], "n": 3,
            "score": "mean_difference", "edit": {"kind": "dense_clamp", "to": -3.0},
            "gate": {"kind": "probe", "alpha": 0.2},
        },
        "compare": {
            "means": {"kind": "steer", "sites": ["resid_post.1"], "edit": {"kind": "shift", "by": -2}},
            "leace": {"kind": "steer", "sites": ["resid_post.1"], "direction": "leace"},
        },
        "calibration": {"keep": 0.7, "max_perplexity": 2.0, "grid": 3, "tolerance": 0.3},
        "output": str(output),
    }  # fmt: skip
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def contents(folder):
    """What a run leaves, without times."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["provenance"]["seconds"]
    summary["provenance"]["config"]["output"] = summary["cost"] = None
    rows = (folder / "rows.jsonl").read_text()
    patches = {
        p.parent.name: json.loads(p.read_text())["tensors"] for p in sorted(folder.glob("patches/*/config.json"))
    }
    return summary, rows, patches


@pytest.fixture(scope="module")
def finished(workplace, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "whole"
    report = execute(load_run(config(workplace, output)))
    return output, report


def test_a_recipe_by_its_name_is_a_method_and_goes_on_where_its_training_was(workplace, tmp_path, monkeypatch):
    recipe = {"preset": "npo", "lr": 1e-2, "batch_size": 5, "epochs": 6, "checkpoint_every": 2}
    settings = {"method": recipe, "compare": {"grad": recipe | {"preset": "grad_diff"}}, "calibration": None}
    whole = config(workplace, tmp_path / "whole", **settings)
    report = execute(load_run(whole))
    assert [entry.name for entry in report.entries] == ["sae", "grad"]
    assert not list((tmp_path / "whole" / "work").iterdir())

    taken, take = [], Loop._take

    def counted(self):
        taken.append(self.step)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Loop, "_take", counted)
    other = config(workplace, tmp_path / "stopped", **settings | {"method": recipe | {"lr": 2e-2}})
    with pytest.raises(KeyboardInterrupt):
        execute(load_run(other))
    taken.clear()
    stopped = config(workplace, tmp_path / "stopped", **settings)  # another learning rate begins anew
    with pytest.raises(KeyboardInterrupt):
        execute(load_run(stopped))
    execute(load_run(stopped))
    assert taken[:6] == [0, 1, 2, 3, 2, 3]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_run_leaves_everything_that_was_promised(finished):
    output, report = finished
    names = {p.name for p in output.iterdir()}
    assert {"config.yaml", "patches", "report.html", "rows.jsonl", "stages", "summary.json"} <= names
    summary = json.loads((output / "summary.json").read_text())
    easy = summary["metrics"]["in_easy/generated_accuracy"]
    assert {"base", "patched", "low", "high", "n", "relative"} <= set(easy)
    assert easy["base"] == 1.0
    assert set(summary["compared"]) == {"sae", "means", "leace"}
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == sum(map(len, report.questions.values()))


def test_the_resolved_config_reproduces_the_run(finished):
    output, _ = finished
    assert load_run(output / "config.yaml") == Run(**yaml.safe_load((output / "config.yaml").read_text()))


def test_the_saved_patch_is_the_calibrated_one(finished, workplace):
    output, report = finished
    patch = load_patch(output / "patches" / "sae", LM.load(str(workplace / "model"), device="cpu"))
    assert patch.strength == report.main.strength
    assert patch.gate.above is not None


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    output, _ = finished
    for name in ("score", "score_texts", "write"):
        monkeypatch.setattr(LM, name, None)
    monkeypatch.setattr("concept_unlearn.methods.base.measure_all", None)
    before = contents(output)
    execute(load_run(output / "config.yaml"))
    assert contents(output) == before


def test_a_change_of_what_matters_is_run_again(finished, workplace, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished[0], output)
    stages = set((output / "stages").iterdir())
    execute(load_run(config(workplace, output), ["method.n=2"]))
    new = {p.name.rsplit("-", 1)[0] for p in set((output / "stages").iterdir()) - stages}
    assert new == {"fit-sae", "strength-sae", "entry-sae"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_that_come_with_the_project_are_valid(path):
    schema = re.match(r"# yaml-language-server: \$schema=(\w+)\.schema\.json\n", path.read_text())
    kind = {"run": Run, "recipe": Recipe, "sequence": SequenceRun}[schema[1]]
    assert load_config(kind, path)


def test_a_method_that_cannot_be_made_is_listed_and_the_others_go_on(finished, workplace, tmp_path):
    output, made = tmp_path / "run", finished[1].provenance["config"]
    bad = {"kind": "steer", "sites": ["resid_post.9"]}
    path = config(workplace, output, name="odd", method=bad, compare=made["compare"] | {"sae": made["method"]})
    done = CliRunner().invoke(app, ["run", str(path)])
    assert done.exit_code == 1
    report = Report.load(output)
    assert {e.name: e.results for e in report.entries} == {e.name: e.results for e in finished[1].entries}
    assert "has layers 0 to 2" in report.missing["odd"]
    for shown in (done.output, (output / "table.md").read_text(), report.html(), Overview({"a": report}).markdown()):
        assert "odd is missing: " in shown
    assert report.as_json()["missing"] == report.missing
    assert Report.merged({"run": report}).missing == {"run/odd": report.missing["odd"]}


def test_a_run_none_of_whose_methods_can_be_made_says_why(workplace, tmp_path):
    path = config(workplace, tmp_path / "run", compare={}, method={"kind": "steer", "sites": ["resid_post.9"]})
    with pytest.raises(SiteNotFound, match="has layers 0 to 2"):
        execute(load_run(path))


def test_what_no_method_can_help_is_said_before_any_is_made(workplace, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise InvalidData("nothing can be asked")

    monkeypatch.setattr(Steer, "fit", lambda *_: pytest.fail("made in vain"))
    monkeypatch.setattr(Suppress, "fit", lambda *_: pytest.fail("made in vain"))
    for name in ("evaluation.benchmark.Benchmark.observe", "run.execution.RetainedUtility.__init__"):
        run = load_run(config(workplace, tmp_path / name))
        with monkeypatch.context() as patched:
            patched.setattr(f"concept_unlearn.{name}", broken)
            with pytest.raises(InvalidData, match="nothing can be asked"):
                execute(run)


def test_another_name_makes_nothing_again(finished, workplace, tmp_path, monkeypatch):
    output = tmp_path / "copy"
    shutil.copytree(finished[0], output)
    made = finished[1].provenance["config"]
    compare = {name: m for name, m in made["compare"].items() if name != "leace"} | {"sae": made["method"]}
    path = config(workplace, output, name="leace", method=made["compare"]["leace"], compare=compare)
    monkeypatch.setattr("concept_unlearn.methods.base.measure_all", None)
    assert [e.name for e in execute(load_run(path)).entries] == ["leace", "means", "sae"]


def test_a_patch_that_was_deleted_is_made_again(finished, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished[0], output)
    shutil.rmtree(output / "patches" / "sae")
    execute(load_run(output / "config.yaml", [f"output={output}"]))
    assert contents(output) == contents(finished[0])


def test_another_config_in_between_leaves_nothing_of_its_own(finished, workplace, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished[0], output)
    path = config(workplace, output)
    other = execute(load_run(path, ["method.n=2", "calibration=null", "compare={}"])).main
    assert other.strength == load_patch(output / "patches" / "sae").strength == 1
    weaker = execute(load_run(path, ["calibration=null"])).main
    assert weaker.strength == load_patch(output / "patches" / "sae").strength == 1
    assert weaker.results == (finished[1].main.as_made or finished[1].main.results)
    execute(load_run(path))
    assert contents(output) == contents(finished[0])


def test_an_attack_that_could_not_be_tried_is_tried_again(workplace, tmp_path, monkeypatch):
    changes = {"compare": {}, "calibration": None, "attacks": {"4 bits": {"kind": "quantise", "bits": 4}}}
    path = config(workplace, tmp_path / "run", **changes)
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install" in str(execute(load_run(path)).main.attacks["4 bits"].skipped)
    report = execute(load_run(path))
    assert [e.attacks["4 bits"].skipped for e in (report.base, report.main)] == [None, None]


def test_killed_anywhere_and_started_again_it_gives_the_same(finished, workplace, tmp_path):
    output = tmp_path / "killed"
    path = config(workplace, output)
    command = [sys.executable, "-m", "concept_unlearn", "run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for stages in (1, 2, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None and len(list((output / "stages").glob("*.json"))) < stages:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(finished[0])


class TestBadInput:
    def test_unknown_keys_anywhere(self, workplace, tmp_path):
        with pytest.raises(InvalidConfig, match="run has no 'modle'; known: model, scope"):
            load_run(config(workplace, tmp_path / "a", modle="x"))
        for key in ("method.nn=3", "method.edit.too=3", "calibration.kep=1", "model.dtyp=x"):
            with pytest.raises(InvalidConfig, match="known: "):
                load_run(config(workplace, tmp_path / "a"), [key])

    def test_methods_that_cannot_be_told_apart_or_put_into_a_folder(self, workplace, tmp_path):
        path = config(workplace, tmp_path / "a")
        for key, says in (
            ("name=means", "two methods are called 'means'"), ("name=a/b", "without a '/'"),
            ("seeds=[1, 1]", "different numbers"),
            ("calibration.metric=out_near/ranked_accuracy", "goes with a benchmark"),
        ):  # fmt: skip
            with pytest.raises(InvalidConfig, match=says):
                load_run(path, [key])

    def test_unknown_components(self, workplace, tmp_path):
        for key, known in (
            ("method.kind=surpress", "steer, suppress"), ("method.edit.kind=clmp", "clamp"),
            ("method.gate=porbe", "probe"), ("method.score=sparse", "sparsity"),
        ):  # fmt: skip
            with pytest.raises(UnknownName, match=known):
                load_run(config(workplace, tmp_path / "a"), [key])
        with pytest.raises(SiteNotFound, match="known"):
            load_run(config(workplace, tmp_path / "a"), ["compare.means.sites=[resid_pst.1]"])

    def test_files_that_are_no_config(self, tmp_path):
        with pytest.raises(InvalidConfig, match="no config file"):
            load_run(tmp_path / "nothing.yaml")
        for text, says in (("a: [", "not YAML"), ("- 1", "should hold a mapping")):
            (tmp_path / "bad.yaml").write_text(text)
            with pytest.raises(InvalidConfig, match=says):
                load_run(tmp_path / "bad.yaml")

    def test_overrides_that_are_none(self, workplace, tmp_path):
        path = config(workplace, tmp_path / "a")
        with pytest.raises(InvalidConfig, match="key=value"):
            load_run(path, ["method.n"])
        with pytest.raises(InvalidConfig, match="scope is no mapping"):
            load_run(path, ["scope.name=3"])

    def test_unknown_dictionaries_and_scopes(self, workplace, tmp_path):
        with pytest.raises(UnknownName, match="no dictionary named 'nowhere'"):
            execute(load_run(config(workplace, tmp_path / "a"), ["method.dictionaries=[nowhere]"]))
        with pytest.raises(UnknownName, match="no concept named 'nothing'"):
            execute(load_run(config(workplace, tmp_path / "a"), ["scope=nothing"]))


class TestSettings:
    def test_overlay_the_common_config_by_name(self, workplace, tmp_path):
        settings = {
            "a": {"compare": {"means": None, "own": {"kind": "steer", "sites": ["resid_post.2"]}}},
            "b": {"scope": "chess", "calibration": None},
        }
        run = load_run(config(workplace, tmp_path / "out", settings=settings))
        a, b = run.runs["a"], run.runs["b"]
        assert (set(a.compare), set(b.compare)) == ({"leace", "own"}, {"means", "leace"})
        assert (a.output, b.output) == (tmp_path / "out" / "a", tmp_path / "out" / "b")
        assert (a.scope, b.scope, b.calibration) == (run.scope, "chess", None)
        assert a.calibration == run.calibration
        assert not a.settings

    def test_without_any_is_the_run_itself(self, workplace, tmp_path):
        for settings in ({}, {"a": None}):
            run = load_run(config(workplace, tmp_path / "out", settings=settings))
            assert run.runs == {"": run}

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"a": {"output": "x"}}, "settings.a: a setting has no 'output' of its own"),
            ({"a/b": {}}, "a setting's name is a folder's"),
            ({"a": {"compare": {"npo": {"kind": "npoo"}}}}, "settings.a: no method named 'npoo'"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, workplace, tmp_path, settings, said):
        with pytest.raises(InvalidConfig, match=said):
            load_run(config(workplace, tmp_path / "out", settings=settings))

    def test_are_run_one_after_another_and_shown_together(self, workplace, tmp_path):
        only = {"calibration": None, "benchmark": {"max_probes": 2, "max_passages": 2}}
        settings = {"a": {"compare": {"means": None}}, "b": {"compare": {"leace": None}}}
        path = config(workplace, tmp_path / "out", settings=settings, **only)
        result = CliRunner().invoke(app, ["run", str(path)])
        assert result.exit_code == 0, result.output
        for name in ("a", "b"):
            assert (tmp_path / "out" / name / "report.html").is_file()
        table = (tmp_path / "out" / "overview.md").read_text()
        assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [
            "| untouched",
            "| sae",
            "| leace",
            "| means",
        ]
