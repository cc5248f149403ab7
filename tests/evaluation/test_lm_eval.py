"""lm-eval's tasks under a patch: without one lm-eval's own numbers, with one those of the patched model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from conftest import D_MODEL, make_hooked, make_perfect_sae, n_hooks, words
from typer.testing import CliRunner
from workers import tiny_tasks, together

import concept_unlearn.cli.lm_eval  # noqa: F401 (registers its verb)
from concept_unlearn.cli.app import app, console
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import InvalidConfig, InvalidData, MissingExtra
from concept_unlearn.evaluation.harness import MODEL, Harness, changes, main, register
from concept_unlearn.gates import SequenceGate
from concept_unlearn.lm import LM
from concept_unlearn.patches import FeaturePatch, Stack, WeightPatch
from concept_unlearn.weights import Dense

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")
TASKS = ("tiny_choice", "tiny_cloze", "tiny_text")


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks over sixteen questions of unequal lengths, with answers of one token and more."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def draw(least, most):
        return words(*rng.choices(range(7, 48), k=rng.randint(least, most)))

    rows = [
        {"question": draw(2, 9), "choices": [draw(1, 3) for _ in range(4)], "right": rng.randrange(4)}
        for _ in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "fewshot_split": "test", "metadata": {"version": 1.0},
    }  # fmt: skip

    def metrics(*names, aggregation="mean"):
        return [{"metric": name, "aggregation": aggregation, "higher_is_better": True} for name in names]

    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}", "metric_list": metrics("acc", "acc_norm"),
        },
        "tiny_cloze": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[right]}}",
            "generation_kwargs": {"until": ["w9"], "max_gen_toks": 6}, "metric_list": metrics("exact_match"),
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
            "metric_list": metrics("word_perplexity", aggregation="weighted_perplexity"),
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task | {"task": name}))
    group = {"group": "tiny", "task": ["tiny_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def harness(folder):
    return Harness(tasks=TASKS, include_path=folder)


@pytest.fixture
def tiny(workplace):
    return LM.load(str(workplace / "model"))


@pytest.fixture
def patches(tiny):
    """One of each kind, and one whose gate decides on the prompt."""
    feature = partial(FeaturePatch, dictionary=make_perfect_sae(), edit=DenseClamp(to=-4.0))
    change = torch.randn(D_MODEL, 32, generator=torch.Generator().manual_seed(0))
    return {
        "feature": feature(features=[1, 3]),
        "weight": WeightPatch({"model.layers.1.mlp.down_proj.weight": Dense(change)}),
        "gated": feature(features=[1], gate=SequenceGate(above=0.5)),
    }


@pytest.fixture(scope="module")
def hf(workplace, harness):
    """What lm-eval says without anything of ours."""
    return lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(workplace / "model")}, device="cpu", batch_size=harness.batch_size,
        tasks=list(TASKS), task_manager=harness.manager,
    )  # fmt: skip


def replies(results):
    return {task: [s["filtered_resps"] for s in samples] for task, samples in results["samples"].items()}


def scores(results, task="tiny_choice"):
    return [float(logprob) for sample in replies(results)[task] for logprob, *_ in sample]


def test_without_a_patch_it_is_lm_evals_own_model(tiny, harness, hf):
    found = harness(tiny)
    assert found["results"] == hf["results"]
    assert replies(found) == replies(hf)
    assert set(found) >= set(hf)


@pytest.mark.parametrize("kind", ["feature", "weight", "gated"])
def test_a_patch_of_strength_zero_changes_rounding_only(tiny, harness, hf, patches, kind):
    found = harness(tiny, patches[kind].at(0.0))
    for change in changes(hf, found):
        assert change.difference == pytest.approx(0, abs=1e-4 * change.before)
    assert scores(found) == pytest.approx(scores(hf), abs=1e-5)
    assert replies(found)["tiny_cloze"] == replies(hf)["tiny_cloze"]


@pytest.mark.parametrize("kind", ["feature", "weight", "gated"])
def test_a_patch_is_on_during_every_kind_of_request(tiny, harness, hf, rows, patches, kind):
    found = harness(tiny, patches[kind])
    with patches[kind].on(tiny):
        scored = tiny.logprobs([r["question"] for r in rows], [r["choices"] for r in rows])
        said = tiny.generate([r["question"] for r in rows], chat=False, max_new_tokens=6)
    assert scores(found) == pytest.approx([float(s.logprobs.sum()) for group in scored for s in group], abs=1e-4)
    written = [sample[0] for sample in replies(found)["tiny_cloze"]]
    assert [w.strip() for w in written] == [s.partition("w9")[0].strip() for s in said]
    assert scores(found) != pytest.approx(scores(hf), abs=1e-3)
    assert {c.task for c in changes(hf, found) if c.difference} >= {"tiny_choice", "tiny_text"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["feature", "weight"])
def test_a_reply_scores_what_one_uncached_pass_gives(tiny, harness, rows, patches, kind):
    expected = []
    with patches[kind].on(tiny):
        for row in rows:
            for choice in row["choices"]:
                prompt, answer = (tiny.encode(text, chat=False) for text in (row["question"], choice))
                logits = tiny.logits(torch.tensor([prompt + answer]))[0].log_softmax(-1)
                expected.append(sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)))
    assert scores(harness(tiny, patches[kind])) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_running_text_is_what_one_pass_over_each_text_gives(tiny, harness, rows, patches, batch_size):
    asked = Harness(tasks=("tiny_text",), include_path=harness.include_path, batch_size=batch_size)
    tiny.tokenizer.bos_token = "w47"  # not what batches are padded with
    texts = [
        torch.tensor([tiny.tokenizer.bos_token_id, *tiny.encode(row["question"], chat=False)]) for row in rows
    ]  # fmt: skip

    def alone(ids):
        return float(tiny.logits(ids[None, :-1])[0].log_softmax(-1).gather(-1, ids[1:, None]).sum())

    with patches["gated"].on(tiny):
        expected = [alone(ids) for ids in texts]
    assert 2 < sum(a != alone(ids) for a, ids in zip(expected, texts, strict=True)) < 14  # the gate tells texts apart
    found = [s["word_perplexity"][0] for s in asked(tiny, patches["gated"])["samples"]["tiny_text"]]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_long_context_loses_its_beginning_as_with_hf(tiny, harness, workplace):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from concept_unlearn.evaluation.harness_model import PatchedHFLM

    long = words(*(7 + i % 40 for i in range(60)))
    asked = [Instance("loglikelihood", {}, (long, f" {reply}"), i) for i, reply in enumerate([words(8), words(9, 10)])]
    plain = HFLM(str(workplace / "model"), device="cpu", max_length=32)
    ours = PatchedHFLM(tiny, Stack(()), max_length=32)
    for (a, is_a), (b, is_b) in zip(plain.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
        assert is_a == is_b
    with pytest.raises(InvalidData, match="33 tokens; the model scores 1 to 32"):
        ours.loglikelihood([Instance("loglikelihood", {}, (words(7), f" {words(*range(8, 41))}"), 0)])


@pytest.mark.parametrize("kind", ["feature", "weight"])
def test_the_model_and_the_world_are_afterwards_what_they_were(tiny, harness, patches, kind):
    def state():
        weights = {n: (p.data_ptr(), p.clone(), p.requires_grad) for n, p in tiny.model.named_parameters()}
        return weights, n_hooks(tiny.model), tiny.model.training, tiny.tokenizer.pad_token, tiny.tokenizer.padding_side

    def assert_same(before, after):
        assert before[1:] == after[1:]
        for name, (pointer, value, grad) in before[0].items():
            assert (pointer, grad) == after[0][name][::2]
            assert torch.equal(value, after[0][name][1])

    tiny.model.train()
    tiny.tokenizer.pad_token = None
    before = state()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    harness(tiny, patches[kind])
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]
    assert_same(before, state())


@pytest.mark.parametrize("request_type", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
@pytest.mark.parametrize("kind", ["feature", "weight"])
def test_an_error_in_the_middle_leaves_nothing_on(tiny, patches, kind, request_type, monkeypatch):
    from lm_eval.api.instance import Instance

    from concept_unlearn.evaluation.harness_model import PatchedHFLM

    model = PatchedHFLM(tiny, patches[kind])
    pointers, hooks, seen = [p.data_ptr() for p in tiny.model.parameters()], n_hooks(tiny.model), []

    def broken(*_, **__):
        seen.append(([p.data_ptr() for p in tiny.model.parameters()], n_hooks(tiny.model)))
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.model.model, "forward", broken)
    arguments = {
        "loglikelihood": (words(7, 8), " w9"), "loglikelihood_rolling": (words(7, 8, 9),),
        "generate_until": (words(7, 8), {"until": [], "max_gen_toks": 4}),
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        getattr(model, request_type)([Instance(request_type, {}, arguments[request_type], 0)])
    assert seen
    assert seen[0] != (pointers, hooks)  # it was on
    assert ([p.data_ptr() for p in tiny.model.parameters()], n_hooks(tiny.model)) == (pointers, hooks)


def test_a_difference_is_paired_document_by_document(tiny, harness, hf, patches):
    found = harness(tiny, patches["feature"])
    by_metric = {(c.task, c.metric): c for c in changes(hf, found)}
    assert list(by_metric) == [
        ("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_cloze", "exact_match"),
        ("tiny_text", "word_perplexity"),
    ]  # fmt: skip
    change = by_metric["tiny_choice", "acc_norm"]
    a, b = (torch.tensor([s["acc_norm"] for s in r["samples"]["tiny_choice"]]) for r in (hf, found))
    assert change.difference == pytest.approx(float((b - a).mean()))
    assert change.difference != 0
    assert change.stderr == pytest.approx(float((b - a).std() / 4))
    assert change.before_stderr == hf["results"]["tiny_choice"]["acc_norm_stderr,none"]
    assert by_metric["tiny_text", "word_perplexity"].stderr is None
    assert all(c.difference == 0 for c in changes(found, found))


def test_a_group_is_paired_over_the_documents_of_its_tasks(tiny, folder, patches):
    asked = Harness(tasks=("tiny",), include_path=folder)
    asked.__dict__["manager"] = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    before, after = asked(tiny), asked(tiny, patches["weight"])
    by_task = {c.task: c for c in changes(before, after) if c.metric == "acc"}
    assert by_task["tiny"].stderr == by_task["tiny_choice"].stderr > 0


class TestAsked:
    def test_limit_examples_and_chat_reach_the_task(self, tiny, folder):
        found = Harness(tasks=("tiny_cloze",), include_path=folder, limit=3, num_fewshot=2, apply_chat_template=True)(
            tiny
        )
        assert found["n-samples"]["tiny_cloze"]["effective"] == 3
        context = found["samples"]["tiny_cloze"][0]["arguments"][0][0]
        assert context.startswith("w4 ")
        assert context.endswith(" w6")
        assert context.count("w5") == 5  # two turns an example
        assert Harness(tasks=("tiny_choice",), include_path=folder, limit=0.5)(tiny)["n-samples"]["tiny_choice"] == {
            "original": 16, "effective": 8,
        }  # fmt: skip

    def test_names_may_hold_a_star_or_be_a_file(self, folder, monkeypatch):
        own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: own(include_path=include_path))
        assert Harness(tasks=("tiny_c*",), include_path=folder).names == ["tiny_choice", "tiny_cloze"]
        file = str(folder / "tiny_text.yaml")
        assert Harness(tasks=(file,)).names == [file]
        with pytest.raises(InvalidConfig, match=r"no task 'tiny_choise': .* Did you mean 'tiny_choice'"):
            _ = Harness(tasks=("tiny_choise",), include_path=folder).names
        with pytest.raises(InvalidConfig, match="no folder of tasks nowhere"):
            _ = Harness(tasks=("tiny_choice",), include_path="nowhere").names

    def test_data_out_of_reach_are_told_of(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        task = {"task": "far", "dataset_path": "nobody/nothing", "test_split": "test", "output_type": "generate_until"}
        (tmp_path / "far.yaml").write_text(yaml.safe_dump(task | {"doc_to_text": "a", "doc_to_target": "b"}))
        with pytest.raises(InvalidData, match=r"data of a task cannot be had: .*nobody/nothing"):
            Harness(tasks=("far",), include_path=tmp_path)(tiny)

    def test_a_batch_size_may_be_found_out(self, tiny, folder, patches, capsys):
        asked = Harness(tasks=("tiny_choice", "tiny_text"), include_path=folder, batch_size="auto", limit=4)
        sized = Harness(**asked.model_dump() | {"batch_size": 4})
        assert scores(asked(tiny, patches["gated"])) == pytest.approx(scores(sized(tiny, patches["gated"])), abs=1e-5)

    def test_a_hooked_transformer_is_none_of_its_models(self, harness, tmp_path):
        with pytest.raises(InvalidConfig, match="decoder-only Hugging Face models; tiny is none"):
            harness(LM(make_hooked(tmp_path)))


class TestFiles:
    def test_are_lm_evals_own(self, tiny, harness, patches, tmp_path):
        from lm_eval.utils import make_table

        found = harness(tiny, patches["feature"], folder=tmp_path / "out", about={"patch": "mine"})
        (path,) = (tmp_path / "out").rglob("results_*.json")
        written = json.loads(path.read_text())
        assert written["results"] == json.loads(json.dumps(found["results"]))
        assert written["config"]["model_args"] == {"pretrained": tiny.name, "patch": "mine"}
        assert set(written["task_hashes"]) == set(TASKS)
        assert "tiny_choice" in make_table(written)
        lines = next(path.parent.glob("samples_tiny_choice_*")).read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert [s["doc_id"] for s in samples] == list(range(16))

    def test_that_cannot_be_written_are_an_error(self, tiny, folder, tmp_path, monkeypatch):
        from lm_eval.loggers import evaluation_tracker

        def full(*_, **__):
            raise OSError("no space left")

        monkeypatch.setattr(evaluation_tracker, "hash_string", full)
        with pytest.raises(OSError, match="could not write its results"):
            Harness(tasks=("tiny_text",), include_path=folder)(tiny, folder=tmp_path)


class TestModelType:
    def test_is_one_of_lm_evals(self, tiny, workplace, harness, patches, tmp_path):
        register()
        register()
        patches["feature"].at(2.0).save(tmp_path / "patch", tiny)
        arguments = f"pretrained={workplace / 'model'},patch={tmp_path / 'patch'},strength=0.5"
        found = lm_eval.simple_evaluate(
            model=MODEL, model_args=arguments, tasks=list(TASKS), task_manager=harness.manager, batch_size=4,
            device="cuda:0",
        )  # fmt: skip
        expected = harness(tiny, patches["feature"].at(0.5))
        assert found["results"]["tiny_choice"] == expected["results"]["tiny_choice"]
        assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
        assert found["config"]["model_args"] == arguments

    @pytest.mark.slow
    def test_is_known_to_lm_evals_own_command(self, tiny, workplace, folder, harness, patches, tmp_path):
        patches["weight"].save(tmp_path / "patch", tiny)
        subprocess.run(
            [
                sys.executable, "-m", "concept_unlearn.evaluation.harness", "--model", MODEL, "--model_args",
                f"pretrained={workplace / 'model'},patch={tmp_path / 'patch'}", "--tasks", ",".join(TASKS),
                "--include_path", folder, "--batch_size", "8", "--output_path", tmp_path / "out",
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        (path,) = (tmp_path / "out").rglob("results_*.json")
        written, expected = json.loads(path.read_text())["results"], harness(tiny, patches["weight"])["results"]
        assert written.keys() == expected.keys()
        for task, values in expected.items():  # another process may add up in another order
            assert written[task] == pytest.approx(values)


class TestShell:
    def shell(self, *arguments, code=0):
        result = CliRunner().invoke(app, ["lm-eval", *map(str, arguments)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    def test_compares_patches_with_the_model(self, tiny, workplace, folder, patches, tmp_path, monkeypatch):
        monkeypatch.setattr(console, "_width", 200)
        for place, kind in (("a", "feature"), ("b", "weight")):
            patches[kind].save(tmp_path / place / "patch", tiny)
        out = self.shell(
            "--model", workplace / "model", "--tasks", ",".join(TASKS), "--include-path", folder, "--output",
            tmp_path / "out", "--patch", tmp_path / "a" / "patch", "--patch", tmp_path / "b" / "patch",
        ).output  # fmt: skip
        for expected in ("before", "after a-patch", "after b-patch", "difference", "acc_norm", "word_perplexity", "±"):
            assert expected in out
        names = {p.relative_to(tmp_path / "out").parts[:-2] for p in (tmp_path / "out").rglob("results_*.json")}
        assert names == {("before",), ("after", "a-patch"), ("after", "b-patch")}

    def test_evaluates_a_checkpoint_alone(self, workplace, folder, hf):
        out = self.shell("--model", workplace / "model", "--tasks", "tiny_choice", "--include-path", folder).output
        assert f"{hf['results']['tiny_choice']['acc_norm,none']:.4f} ±" in out
        assert "difference" not in out

    @pytest.mark.parametrize(
        ("option", "says"),
        [
            (("--limit", "-1"), "limit: Input should be greater than 0"),
            (("--batch-size", "many"), "batch_size"),
            (("--include-path", "nowhere"), "no folder of tasks nowhere"),
        ],
    )
    def test_says_what_it_cannot_do(self, workplace, option, says):
        result = self.shell("--model", workplace / "model", "--tasks", "tiny_choice", *option, code=1)
        assert isinstance(result.exception, InvalidConfig)
        assert says in str(result.exception)


def test_two_processes_give_what_one_does(tiny, folder, tmp_path):
    together(2, tiny_tasks, folder, tmp_path / "two")
    tiny_tasks(folder, tmp_path / "one")
    one, two = (json.loads((tmp_path / n / "changes.json").read_text()) for n in ("one", "two"))
    assert len(one) == 3
    for (name, *a), (other, *b) in zip(one, two, strict=True):
        assert name == other
        assert a == pytest.approx(b, rel=1e-5)


def test_without_lm_eval_the_pip_line_is_told(harness, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for work in (lambda: Harness(tasks=("arc_easy",)).names, register, main):
        with pytest.raises(MissingExtra, match="pip install lm_eval"):
            work()


def test_importing_the_package_imports_nothing_of_it():
    code = (
        "import sys, concept_unlearn, concept_unlearn.evaluation.harness, concept_unlearn.cli.lm_eval;"
        "assert 'lm_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
