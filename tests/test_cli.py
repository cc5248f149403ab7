"""The shell: each verb works, and an error of the user's is one line that says what is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_run import config
from typer.testing import CliRunner

from concept_unlearn.cli import app, main
from concept_unlearn.cli.unlearning import fit, unlearn
from concept_unlearn.errors import InvalidConfig, PatchMismatch, UnknownName
from concept_unlearn.lm import LM
from concept_unlearn.methods import Method, preset
from concept_unlearn.patches import load_patch


def shell(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def test_run_prints_what_a_newcomer_understands(workplace, tmp_path):
    out = shell("run", config(workplace, tmp_path / "out"), "--set", "compare={}", "--set", "calibration.grid=2")
    for expected in ("Forgotten", "Kept", "Side effects", "95 % interval", "Before and after", "report.html"):
        assert expected in out


def test_unlearn_then_evaluate(workplace, tmp_path):
    common = ("--model", workplace / "model", "--scope", workplace / "scope")
    out = shell(
        "unlearn", *common, "--dictionary", workplace / "dictionary", "--output", tmp_path / "patch",
        "--score", "mean_difference", "--n", 3, "--edit", "{kind: dense_clamp, to: -2}",
        "--keep", 0.6, "--max-perplexity", 3.0, "--grid", 3,
    )  # fmt: skip
    assert "strength" in out
    out = shell("evaluate", *common, "--patch", tmp_path / "patch", "--output", tmp_path / "report", "--max-probes", 4)
    assert "answers right" in out
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["patch"] == "patch"


def test_fit_then_evaluate_then_bake(workplace, tmp_path):
    common = ("--model", workplace / "model", "--scope", workplace / "scope")
    out = shell("fit", "npo", *common, "--output", tmp_path / "npo", "--set", "lr=1e-2", "--set", "epochs=2")
    assert f"{tmp_path / 'npo'}: a weight patch of" in out
    assert json.loads((tmp_path / "npo" / "config.json").read_text())["made"]["method"]["lr"] == 1e-2
    assert {p.name.split("-")[0] for p in (tmp_path / "npo").iterdir()} == {"config.json", "patch"}
    out = shell("evaluate", *common, "--patch", tmp_path / "npo", "--max-probes", 4)
    assert "answers right" in out
    shell("bake", tmp_path / "npo", "--model", workplace / "model", "--output", tmp_path / "baked")
    with pytest.raises(PatchMismatch):
        load_patch(tmp_path / "npo", LM.load(str(tmp_path / "baked")))


def test_a_sequence_of_requests_goes_on_and_leaves_a_table_and_a_patch(workplace, tmp_path):
    settings = {
        "model": {"name": str(workplace / "model"), "device": "cpu"},
        "requests": [str(workplace / "scope"), {"kind": "concept", "scope": str(workplace / "scope"), "half": "tune"}],
        "method": {"preset": "grad_diff", "lr": 1e-2, "max_steps": 2},
        "benchmark": {"max_probes": 4, "max_passages": 2},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "sequence.yaml").write_text(yaml.safe_dump(settings))
    out = shell("sequence", tmp_path / "sequence.yaml", "--set", "fixed_reference=true")
    for expected in ("scope left", "scope 2 left", "kept", "gibberish", "the untouched model", "sequence.md"):
        assert expected in out
    assert shell("sequence", tmp_path / "out" / "config.yaml") == out
    patch = load_patch(tmp_path / "out" / "patch", LM.load(str(workplace / "model"), device="cpu"))
    assert patch.kind == "stack"


def test_fit_takes_a_file_or_any_kind_of_method(workplace, tmp_path):
    common = ("--model", workplace / "model", "--scope", workplace / "scope", "--output", tmp_path / "patch")
    (tmp_path / "mine.yaml").write_text("{kind: finetune, objectives: [{kind: ga, weight: 0.1}, retain_kl]}")
    shell("fit", tmp_path / "mine.yaml", *common, "--set", "max_steps=1", "--whole")
    for method, setting in (("steer", "sites=[resid_post.1]"), ("negate", "max_steps=1")):
        shell("fit", method, *common, "--set", setting)
        made = json.loads((tmp_path / "patch" / "config.json").read_text())["made"]
        assert (made["method"]["kind"], made["data_kinds"]) == (method, ["text"])
    with pytest.raises(UnknownName, match=r"no method named 'npoo'.* Did you mean 'npo'"):
        fit("npoo", output=tmp_path / "other", scope=str(workplace / "scope"))


def test_fit_touches_nothing_that_is_not_its_own(workplace, tmp_path):
    common = ("--model", workplace / "model", "--scope", workplace / "scope")
    (tmp_path / "mine" / "work").mkdir(parents=True)
    (tmp_path / "mine" / "work" / "thesis.txt").write_text("mine")
    for folder, foreign in (("mine", "work"), ("thesis.txt", "is a file")):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(InvalidConfig, match=foreign):
            fit("npo", output=tmp_path / folder, scope=str(workplace / "scope"))
    with pytest.raises(InvalidConfig, match="holds something else"):
        fit("npo", output=workplace / "model", scope=str(workplace / "scope"))
    with pytest.raises(InvalidConfig, match="holds something else"):
        unlearn(str(workplace / "scope"), workplace / "model", ["none"])
    assert (tmp_path / "mine" / "work" / "thesis.txt").read_text() == "mine"
    with pytest.raises(InvalidConfig, match="no config file"):
        fit(str(tmp_path / "none.yaml"), output=tmp_path / "new", scope=str(workplace / "scope"))
    for _ in range(2):  # its own patch may be made anew
        shell("fit", "npo", *common, "--output", tmp_path / "new", "--set", "max_steps=1")


def test_a_recipe_is_shown_with_all_its_settings():
    assert Method.parse(yaml.safe_load(shell("show", "npo_kl"))) == preset("npo_kl")
    assert yaml.safe_load(shell("show", "dsg"))["dictionaries"] == ["DICTIONARY"]


def test_rank_shows_features(workplace):
    out = shell(
        "rank", "--model", workplace / "model", "--scope", workplace / "scope",
        "--dictionary", workplace / "dictionary", "--score", "mean_difference", "--n", 5,
    )  # fmt: skip
    assert "forget tokens" in out
    assert len([line for line in out.splitlines() if "%" in line]) == 5


def test_list_names_what_is_built_in():
    out = shell("list")
    for name in (
        "smollm2",
        "chess",
        "selectivity",
        "dense_clamp",
        "streaming",
        "suppress",
        "dsg",
        "tofu",
        "rouge",
        "relearn",
    ):
        assert name in out


@pytest.mark.parametrize("what", ["run", "recipe", "sequence"])
def test_the_schema_is_json_and_the_committed_one_is_up_to_date(what):
    committed = Path(__file__).parents[1] / "configs" / f"{what}.schema.json"
    assert json.loads(committed.read_text()) == json.loads(shell("schema", what))


VERBS = (
    "run",
    "sequence",
    "unlearn",
    "evaluate",
    "rank",
    "fetch",
    "list",
    "schema",
    "write",
    "harvest",
    "train",
    "eval-dictionary",
    "attack",
    "compare",
    "teach",
    "lm-eval",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    assert "Usage" in shell(verb, "--help")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nothing.yaml"], "InvalidConfig: no config file nothing.yaml"),
        (["run", "[/a] [b].yaml"], "InvalidConfig: no config file [/a] [b].yaml"),
        (["fetch", "smollm3"], "no embedded model named 'smollm3'; known: smollm2"),
        (["rank", "--scope", "chest", "--dictionary", "x"], "no concept named 'chest'; known: astronomy"),
    ],
)
def test_a_users_error_is_one_line_and_no_traceback(arguments, says, monkeypatch, capsys, workplace):
    if arguments[0] == "rank":
        arguments = [*arguments, "--model", str(workplace / "model")]
    monkeypatch.setattr(sys, "argv", ["concept-unlearn", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert "Traceback" not in error


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "concept_unlearn", "--help"], capture_output=True, text=True, check=True
    )
    assert "Make a language model forget a concept" in done.stdout
