"""Verbs that judge: a patch, a checkpoint or a model alone, under any benchmark, attacked, and run beside run."""

from __future__ import annotations

import json

import pytest
import typer
from conftest import words
from test_cli import shell
from test_run import config

from concept_unlearn.cli import app
from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.lm import LM
from concept_unlearn.report import Report


@pytest.fixture(scope="module")
def common(workplace):
    return "--model", workplace / "model", "--scope", workplace / "scope"


@pytest.fixture(scope="module")
def patch(workplace, common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches") / "sae"
    shell(
        "unlearn", *common, "--dictionary", workplace / "dictionary", "--output", folder, "--score", "mean_difference",
        "--n", 3, "--edit", "{kind: dense_clamp, to: -2}", "--keep", 0.6, "--max-perplexity", 3.0, "--grid", 3,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    for k, name in enumerate(
        ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    ):
        rows = [
            {
                "question": words(7 + k, 12 + i, 20), "answer": words(25 + i, 30 + k),
                "perturbed_answer": [words(40, 41 + i)],
                "paraphrased_answer": words(26 + i, 31 + k), "paraphrased_question": words(8 + k, 12 + i, 21),
            }
            for i in range(4)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_checkpoint_on_disk_is_evaluated_with_one_command(workplace, tofu, tmp_path):
    spec = f"{{kind: tofu, data: {tofu}, forget: forget01, max_new_tokens: 4}}"
    out = shell("evaluate", "--benchmark", spec, "--model", workplace / "model", "--output", tmp_path / "alone")
    assert "model utility" in out
    found = Report.load(tmp_path / "alone")
    assert found.entries == ()
    assert found.base.results["retain/probability"].value > 0
    both = ("--model", workplace / "model", "--checkpoint", workplace / "model", "--retrained", workplace / "model")
    shell("evaluate", "--benchmark", spec, *both, "--output", tmp_path / "both")
    (entry,) = Report.load(tmp_path / "both").entries
    assert entry.about == "a checkpoint"
    assert entry.results["forget/forget_quality"].value == 1


def test_an_evaluation_takes_attacks(common, patch, tmp_path):
    shell(
        "evaluate", *common, "--patch", patch, "--max-probes", 3, "--output", tmp_path, "--attack", "prefill",
        "--attack", "{kind: in_context, k: 1}", "--attack", "{kind: in_context, k: 2}",
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["attacks"]["sae"]["tried"]) == {"prefill", "in_context", "in_context 2"}


def test_attacks_alone_are_a_table_beside_the_untouched_model(common, patch, tmp_path):
    out = shell("attack", "prefill", "{kind: logit_lens, stride: 1}", *common, "--patch", patch, "--max-probes", 3)
    assert {"untouched", "sae"} <= set(out.split())
    assert all(
        any(line.strip("│ ").startswith(name) for line in out.splitlines())
        for name in ("none", "prefill", "logit_lens")
    )


def test_an_attack_that_measures_something_of_its_own_shows_it(common, patch, tmp_path):
    out = shell("attack", "{kind: linear_probe, folds: 3}", *common, "--patch", patch)
    assert "forget/probe_auc" in out


def test_a_scope_says_what_was_forgotten_beside_a_benchmark_that_does_not(common, tmp_path):
    rows = [{"question": words(9, i), "choices": [words(20), words(21)], "answer": i % 2} for i in range(30, 34)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = f"{{kind: multiple_choice, forget: [{tmp_path}/quiz.jsonl], retain: [], score: norm}}"
    out = shell("attack", "{kind: relearn, k: 2, steps: 1}", *common, "--benchmark", quiz)
    assert "relearn" in out


def test_runs_are_put_beside_one_another(workplace, tmp_path):
    for name, n in (("one", 2), ("two", 3)):
        changes = ("compare={}", f"method.n={n}", f"name={name}", "calibration=null")
        shell("run", config(workplace, tmp_path / name), *(part for one in changes for part in ("--set", one)))
    out = shell("compare", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "both")
    assert {"one", "two"} <= set(out.split())
    assert [e.name for e in Report.load(tmp_path / "both").entries] == ["one", "two"]
    shell("compare", tmp_path / "one", tmp_path / "two", tmp_path / "both", "--output", tmp_path / "both")
    assert [e.name for e in Report.load(tmp_path / "both").entries] == ["one", "two"]
    data, saved = json.loads(shell("compare", tmp_path / "both", "--json")), tmp_path / "both" / "summary.json"
    assert data | {"provenance": None} == json.loads(saved.read_text()) | {"provenance": None}
    with pytest.raises(InvalidConfig, match=r"holds a report.json"):
        shell_raises("compare", tmp_path)


def test_every_verb_that_ends_in_a_table_offers_it_as_json(common, patch, tmp_path):
    tables = {"attack", "compare", "doctor", "evaluate", "explain", "inspect", "list", "rank", "run", "sequence"}
    verbs = typer.main.get_command(app).commands
    assert {name for name, verb in verbs.items() if any("--json" in p.opts for p in verb.params)} >= tables
    found = json.loads(shell("attack", "prefill", *common, "--patch", patch, "--max-probes", 2, "--json"))
    assert set(found) == {"untouched", patch.name}
    assert set(found["untouched"]) == {"none", "prefill"}
    dictionary = ("--dictionary", common[1].parent / "dictionary", "--score", "mean_difference")
    ranked = json.loads(shell("rank", *common, *dictionary, "--n", 3, "--json"))
    assert [set(row) for row in ranked] == [
        {"feature", "score", "forget_rate", "retain_rate", "forget_mean", "largest"}
    ] * 3


def test_seeds_of_a_method_stand_together(workplace, tmp_path):
    recipe = "{preset: npo, lr: 1.0e-2, batch_size: 5, epochs: 1}"
    changes = ("--set", f"method={recipe}", "--set", "compare={}", "--set", "calibration=null", "--set", "seeds=[0, 1]")
    shell("run", config(workplace, tmp_path / "seeds"), *changes)
    report = Report.load(tmp_path / "seeds")
    assert [(e.name, e.seed) for e in report.entries] == [("sae", 0), ("sae", 1)]
    assert len(report.groups["sae"]) == 2


def test_a_model_is_taught_with_and_without_what_is_to_be_forgotten(workplace, tmp_path):
    settings = ("--set", "lr=1e-2", "--set", "epochs=2", "--set", "batch_size=4", "--model", workplace / "model")
    shell("teach", workplace / "scope", "--output", tmp_path / "taught", *settings)
    shell("teach", workplace / "scope", "--output", tmp_path / "without", "--without-forget", *settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taught", "without"]
    text = [[words(*range(33, 41))]]
    before, taught, without = (
        float(LM.load(str(folder)).logprobs([words(32)], text)[0][0].logprobs.sum())
        for folder in (workplace / "model", tmp_path / "taught", tmp_path / "without")
    )
    assert taught > max(before, without)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("evaluate",), InvalidConfig, "give --scope, or --benchmark"),
        (
            ("attack", "relearn", "--benchmark", "{kind: multiple_choice, forget: a/b}"),
            InvalidConfig,
            "does not hold it",
        ),
        (("evaluate", "--benchmark", "{kind: tofu, data: nowhere/}"), InvalidData, "nowhere"),
        (("evaluate", "--benchmark", "{kind: tofu"), InvalidConfig, "is not YAML"),
    ],
)
def test_what_cannot_be_judged_is_said(workplace, arguments, error, says):
    with pytest.raises(error, match=says):
        shell_raises(*arguments, "--model", workplace / "model")


def test_two_patches_of_one_name_are_refused(common, patch):
    with pytest.raises(InvalidConfig, match="two of these are called 'sae'"):
        shell_raises("evaluate", *common, "--patch", patch, "--patch", patch)


def shell_raises(*arguments):
    from concept_unlearn.cli import app

    app([str(a) for a in arguments], standalone_mode=False)
