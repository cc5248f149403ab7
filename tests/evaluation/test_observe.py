"""One pass is as good as one pass a number: same values, any batch, any process, any moment of a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_hf, make_perfect_sae, make_tokenizer, n_hooks, words
from workers import ASKED, observe_in, start, tiny_lm, tiny_sets, tiny_weight_patch, together

from concept_unlearn.activations.processes import Processes
from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.edits import DenseClamp
from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.evaluation.benchmark import passes
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.question import encode_probe
from concept_unlearn.evaluation.records import Key, Records
from concept_unlearn.evaluation.view import SCORED, Asked, Reply, Tokens
from concept_unlearn.lm import LM
from concept_unlearn.patches import FeaturePatch, Stack

ALONE = Processes(0, 1)
END = 5
"""What ends a reply under the tiny chat template: w5."""


def feature_patch():
    return FeaturePatch(dictionary=make_perfect_sae(), features=[1, 3], edit=DenseClamp(to=-4.0))


PATCHES = {"none": lambda: None, "weight": tiny_weight_patch, "feature": feature_patch}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of an observation that nothing stopped."""
    folder = tmp_path_factory.mktemp("observed") / "whole"
    observe_in(folder)
    return folder


def records(folder):
    return (folder / "records.jsonl").read_bytes()


def ids_of(text):
    return [{"<bos>": 0}.get(w) if w == "<bos>" else int(w[1:]) for w in text.split()]


def prompt_of(probe):
    """As the tiny template renders it, by hand."""
    if not probe.chat:
        return ids_of(f"{probe.prompt} {probe.opening}")
    turns = [token for message in (*probe.history, probe.prompt) for token in (4, *ids_of(message), 5)]
    return [*turns, 6, *ids_of(probe.opening)]


def uncached(lm, prompt, answer):
    """Log-probabilities over the vocabulary at each token of an answer, from one pass over everything."""
    logits = lm.logits(torch.tensor([[*prompt, *answer]]))[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def assert_alike(a, b, tolerance=1e-4):
    assert (a.n, a.n_end, a.greedy) == (b.n, b.n_end, b.greedy)
    for name in ("logprobs", "mean", "std"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=tolerance)


def assert_same_views(a, b):
    for name, seen in a.sets.items():
        for one, other in zip(seen.records, b[name].records, strict=True):
            assert one.keys() == other.keys()
            for read, value in one.items():
                if read in SCORED:
                    for x, y in zip(value, other[read], strict=True):
                        assert_alike(x, y)
                elif read == "said":
                    assert value == other[read]
                else:
                    assert value == pytest.approx(other[read], abs=1e-4)


class TestAnswers:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", list(PATCHES))
    def test_score_what_one_uncached_pass_each_gives(self, lm, kind):
        sets, patch = tiny_sets(), PATCHES[kind]()
        view = observe(lm, sets, {"forget": frozenset((*SCORED, "moments"))}, patch=patch, batch_size=7)
        with (patch or Stack(())).on(lm):
            for probe, record in zip(sets["forget"].examples, view["forget"].records, strict=True):
                assert encode_probe(lm, probe).prompt == prompt_of(probe)
                for name in SCORED:
                    for text, found in zip(getattr(probe, name), record[name], strict=True):
                        answer = ids_of(text) + [END] * probe.chat
                        expected = uncached(lm, prompt_of(probe), answer)
                        chosen = expected.gather(-1, torch.tensor(answer)[:, None])[:, 0]
                        assert found.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
                        assert found.greedy == tuple((expected.argmax(-1) == torch.tensor(answer)).tolist())
                        assert found.n_end == probe.chat
                        if name != "answers":
                            assert found.mean == found.std == ()
                            continue
                        p = expected.double().exp()
                        mean = (p * expected).sum(-1)
                        spread = (p * (expected - mean[:, None]).square()).sum(-1).sqrt()
                        assert found.mean == pytest.approx(mean.tolist(), abs=1e-4)
                        assert found.std == pytest.approx(spread.tolist(), abs=2e-3)

    def test_of_one_prompt_share_it(self, lm):
        probe = Probe(
            prompt=words(7, 8, 9, 10), answers=(words(11, 12), words(13)), distractors=(words(14, 15, 16),) * 2,
            paraphrases=(words(17),),
        )  # fmt: skip
        seen = []
        handle = lm.model.register_forward_pre_hook(
            lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        view = observe(lm, {"forget": Asked((probe,))}, {"forget": frozenset(SCORED)})
        handle.remove()
        assert seen == [(1, 4), (5, 2)]
        assert view.seen == {"prompt_tokens": 4, "answer_tokens": 10, "written_tokens": 0}

    def test_have_moments_only_where_they_are_asked_for(self, lm):
        probe = Probe(prompt="w7", answers=("w8 w9",))
        sets = {"a": Asked((probe,)), "b": Asked((probe,)), "c": Asked((Passage(text="w7 w8"),))}
        reads = {"a": frozenset(("answers", "moments")), "b": frozenset(("answers",)), "c": frozenset(("answers",))}
        view = observe(lm, sets, reads)
        assert view["a"].holds("moments")
        assert not view["b"].holds("moments")
        assert not view["c"].holds("moments")

    def test_a_set_without_what_is_asked_of_it_is_empty_not_missing(self, lm):
        probe = Probe(prompt="w7", answers=("w8",))
        view = observe(lm, {"a": Asked((probe, probe))}, {"a": frozenset(("paraphrases", "distractors"))})
        assert view["a"].paraphrases == view["a"].distractors == ((), ())
        passages = observe(lm, {"a": Asked((Passage(text="w7 w8"),))}, {"a": frozenset(("distractors",))})
        with pytest.raises(InvalidData, match="holds no distractors"):
            _ = passages["a"].distractors

    def test_without_a_template_follow_an_empty_line_and_end_with_eos(self, lm):
        lm.tokenizer.chat_template = None
        probe = Probe(prompt="w7 w8", answers=("w9",), chat=True, history=("w10", "w11"))
        assert encode_probe(lm, probe).prompt == [10, 11, 7, 8]
        view = observe(lm, {"a": Asked((probe,))}, {"a": frozenset(("answers",))})
        ((found,),) = view["a"].answers
        with torch.no_grad():
            expected = uncached(lm, [10, 11, 7, 8], [9, 1])
        assert found.logprobs == pytest.approx([float(expected[0, 9]), float(expected[1, 1])], abs=1e-5)
        assert found.n_end == 1
        assert found.body.logprobs == found.logprobs[:1]


class TestTexts:
    @pytest.fixture
    def short(self, lm):
        """A model that reads sixteen tokens."""
        lm.model.config.max_position_embeddings = 16
        assert lm.context == 16
        return lm

    @torch.no_grad()
    @pytest.mark.parametrize("bos", ["", "<bos> "])
    @pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 23, 24, 25, 32, 61])
    def test_score_every_token_once_whatever_their_length(self, short, n, bos):
        text = bos + words(*(7 + (5 * i) % 40 for i in range(n)))
        sets = {"text": Asked((Passage(text="w7 w8 w9"), Passage(text=text)))}
        _, (found,) = observe(short, sets, {"text": frozenset(("answers", "moments"))})["text"].answers
        ids = ids_of(text)
        assert found.n == len(found.greedy) == len(found.mean) == len(ids) - 1
        for t in range(1, len(ids)):
            begins = max(0, -(-(t - 15) // 8) * 8)  # of the first window, each eight tokens on, that reaches it
            assert begins == 0 or 8 <= t - begins < 16
            before = ids[begins:t] if begins == 0 or not bos else [0, *ids[begins + 1 : t]]
            expected = short.logits(torch.tensor([before]))[0, -1].log_softmax(-1)
            assert found.logprobs[t - 1] == pytest.approx(float(expected[ids[t]]), abs=1e-4)

    @torch.no_grad()
    def test_that_fit_are_read_in_one_pass_and_cut_where_asked(self, lm):
        sets = tiny_sets()
        view = observe(lm, sets, {"text": frozenset(("answers",))})
        for passage, (found,) in zip(sets["text"].examples, view["text"].answers, strict=True):
            ids = ids_of(passage.text)[:24]
            expected = uncached(lm, ids[:1], ids[1:]).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-4)

    def test_and_questions_that_the_model_cannot_read_are_named(self, short):
        probe = Probe(prompt=words(*range(7, 20)), answers=("w8", words(*range(8, 12))))
        fits = probe.model_copy(update={"answers": ("w8 w9", words(*range(8, 11)))})
        asked = {"a": frozenset(("answers",))}
        observe(short, {"a": Asked((fits,))}, asked)
        with pytest.raises(InvalidData, match=r"set 'a', example 1: .* takes 17 tokens"):
            observe(short, {"a": Asked((fits, probe.model_copy(update={"prompt": words(*range(7, 21))})))}, asked)
        with pytest.raises(InvalidData, match=r"set 'a', example 0: .* takes 213 tokens, and tiny-llama reads 16"):
            observe(short, {"a": Asked((fits,))}, {"a": frozenset(("said",))})


class TestReplies:
    def test_are_what_the_model_writes_to_each_alone_cut_at_a_stop(self, lm):
        sets = tiny_sets()
        view = observe(lm, sets, {n: frozenset(("said",)) for n in ("forget", "retain")}, batch_size=4)
        stopped = 0
        for name, seen in view.sets.items():
            for probe, said in zip(seen.probes, seen.said, strict=True):
                n = sets[name].reply_tokens(probe)
                assert n == (5 if name == "retain" else 4 if probe.chat else 3)
                (ids,) = lm.generate_ids([prompt_of(probe)], max_new_tokens=n)
                kept = ids[: ids.index(21)] if name == "retain" and 21 in ids else ids
                stopped += kept != ids
                assert said == Reply(tuple(kept), lm.tokenizer.decode(kept, skip_special_tokens=True).strip())
        assert stopped
        assert view.seen["written_tokens"] > sum(len(s.ids) for seen in view.sets.values() for s in seen.said)

    def test_come_from_probes_only(self, lm):
        with pytest.raises(InvalidData, match="set 'text' holds passages, which nobody can reply to"):
            observe(lm, {"text": Asked((Passage(text="w7 w8"),))}, {"text": frozenset(("said",))})

    @torch.no_grad()
    @pytest.mark.parametrize("patched", [True, False])
    @pytest.mark.parametrize("judge", [None, make_hf("llama", 7)], ids=["itself", "another"])
    def test_are_judged_by_a_model_without_the_patch(self, lm, judge, patched):
        sets = tiny_sets()
        judge = None if judge is None else LM(judge, make_tokenizer(), name="judge")
        reads = {"forget": frozenset(("said", "surprise"))}
        told = []
        view = observe(
            lm, sets, reads, patch=tiny_weight_patch() if patched else None, judge=judge, progress=told.append
        )
        assert sum(told) == 2 * len(sets["forget"].examples)
        for probe, said, found in zip(view["forget"].probes, view["forget"].said, view["forget"].surprise, strict=True):
            if not said.ids:
                assert found is None
                continue
            expected = uncached(judge or lm, prompt_of(probe), said.ids).gather(-1, torch.tensor(said.ids)[:, None])
            assert found == pytest.approx(-float(expected.mean()), abs=1e-4)

    def test_that_are_empty_surprise_nobody(self, lm):
        lm.model.generation_config.eos_token_id = list(range(48))  # whatever it says ends its reply
        view = observe(lm, tiny_sets(), {"forget": frozenset(("said", "surprise"))})
        assert {s.ids for s in view["forget"].said} == {()}
        assert set(view["forget"].surprise) == {None}

    def test_cannot_be_judged_in_another_tokenizer(self, lm):
        other = make_tokenizer()
        other.add_tokens(["w99"])
        with pytest.raises(InvalidData, match="judge cannot judge what tiny-llama writes"):
            observe(
                lm, tiny_sets(), {"forget": frozenset(("said", "surprise"))},
                judge=LM(make_hf(), other, name="judge"),
            )  # fmt: skip


class TestGradients:
    @pytest.mark.parametrize("kind", list(PATCHES))
    def test_are_those_of_autograd_on_the_first_answers_mean_nll(self, lm, kind):
        sets, patch = tiny_sets(), PATCHES[kind]()
        sets = {"forget": sets["forget"], "text": replace(sets["text"], max_tokens=None)}
        view = observe(lm, sets, dict.fromkeys(sets, frozenset(("gradnorm",))), patch=patch)
        for seen in view.sets.values():
            for example, found in zip(seen.examples, seen.gradnorm, strict=True):
                if isinstance(example, Probe):
                    prompt, answer = prompt_of(example), ids_of(example.answers[0]) + [END] * example.chat
                else:
                    prompt, answer = ids_of(example.text)[:1], ids_of(example.text)[1:]
                with (patch or Stack(())).on(lm):
                    chosen = uncached(lm, prompt, answer).gather(-1, torch.tensor(answer)[:, None])
                    norms = [g.norm() for g in torch.autograd.grad(-chosen.mean(), list(lm.model.parameters()))]
                assert found["mean"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-3)
                assert found["global"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-3)

    def test_leave_no_trace(self, lm):
        lm.model.train()
        first, second, *_ = lm.model.parameters()
        first.requires_grad_(False)
        second.grad = torch.ones_like(second)
        values, grad, patch = [p.clone() for p in lm.model.parameters()], second.grad, feature_patch()
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        with torch.no_grad():
            observe(lm, tiny_sets(), {"forget": frozenset(("gradnorm",))}, patch=patch)
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.rand(2), expected)
        assert all(module.training for module in lm.model.modules())
        assert not first.requires_grad
        assert second.requires_grad
        assert second.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))
        assert all(torch.equal(p, v) for p, v in zip(lm.model.parameters(), values, strict=True))
        assert [p.grad for p in lm.model.parameters() if p is not second] == [None] * (len(values) - 1)
        assert n_hooks(lm.model) == 0


class TestBatches:
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_of_any_size_give_the_same(self, lm, batch_size):
        expected = observe(lm, tiny_sets(), ASKED, patch=feature_patch(), batch_size=8)
        assert_same_views(expected, observe(lm, tiny_sets(), ASKED, patch=feature_patch(), batch_size=batch_size))

    def test_in_any_order_give_the_same(self, lm):
        sets = tiny_sets()
        turned = {name: replace(asked, examples=asked.examples[::-1]) for name, asked in reversed(sets.items())}
        view, other = observe(lm, sets, ASKED), observe(lm, turned, ASKED)
        back = {n: replace(s, asked=sets[n], records=s.records[::-1]) for n, s in other.sets.items()}
        assert_same_views(view, replace(other, sets=back))

    def test_tell_of_each_example_as_often_as_it_is_read(self, lm):
        told, sets = [], tiny_sets()
        observe(lm, sets, ASKED, batch_size=4, progress=told.append)
        assert sum(told) == sum(len(sets[name].examples) * passes(reads) for name, reads in ASKED.items())


class TestFolder:
    def test_holds_what_the_view_does(self, whole):
        torch.set_num_threads(1)
        expected = observe(tiny_lm(), tiny_sets(), ASKED, patch=tiny_weight_patch(), batch_size=6)
        found = observe(tiny_lm(), tiny_sets(), ASKED, patch=tiny_weight_patch(), batch_size=6, folder=whole)
        assert {n: s.records for n, s in found.sets.items()} == {n: s.records for n, s in expected.sets.items()}
        assert {p.name for p in whole.iterdir()} == {"observation.json", "records.jsonl"}

    def test_that_is_whole_asks_nothing_of_the_model(self, whole, monkeypatch):
        lm, kept = tiny_lm(), records(whole)
        patch = tiny_weight_patch()
        monkeypatch.setattr(type(lm.model), "forward", None)
        view = observe(lm, tiny_sets(), ASKED, patch=patch, batch_size=6, folder=whole)
        assert set(view.seen.values()) == {0}
        assert records(whole) == kept

    def test_stopped_at_any_batch_ends_with_the_same_records(self, whole, tmp_path):
        told = []
        observe(tiny_lm(), tiny_sets(), ASKED, patch=tiny_weight_patch(), batch_size=6, progress=told.append)
        assert len(told) > 30

        def stop_after(n):
            left = iter(range(n))

            def progress(_):
                if next(left, None) is None:
                    raise KeyboardInterrupt

            return progress

        for n in range(len(told)):
            folder = tmp_path / str(n)
            with pytest.raises(KeyboardInterrupt):
                observe(
                    tiny_lm(), tiny_sets(), ASKED, patch=tiny_weight_patch(), batch_size=6, folder=folder,
                    progress=stop_after(n),
                )  # fmt: skip
            assert not (folder / "records.jsonl").exists() or records(folder) != records(whole) or n == len(told) - 1
            observe_in(folder)
            assert records(folder) == records(whole), n
            assert len(list(folder.iterdir())) == 2

    def test_killed_again_and_again_ends_with_the_same_records(self, whole, tmp_path):
        for stop in (2, 9, 30):
            process = start(observe_in, tmp_path / "killed", stop)
            process.join()
            assert process.exitcode == -9
        observe_in(tmp_path / "killed")
        assert records(tmp_path / "killed") == records(whole)

    def test_of_two_processes_is_that_of_one_and_each_batch_is_done_once(self, whole, tmp_path):
        together(2, observe_in, tmp_path / "two")
        assert records(tmp_path / "two") == records(whole)
        assert {p.name for p in (tmp_path / "two").iterdir()} == {"observation.json", "records.jsonl"}
        one, two = (folder.with_suffix(".json").read_text() for folder in (whole, tmp_path / "two"))
        assert json.loads(two) == json.loads(one) != dict.fromkeys(json.loads(one), 0)

    def test_begun_by_two_processes_is_finished_by_one(self, whole, tmp_path):
        for rank in (0, 1):
            parts = Records(
                tmp_path / "begun", json.loads((whole / "observation.json").read_text()), Processes(rank, 1)
            )
            for line in (whole / "records.jsonl").read_text().splitlines()[rank::3]:
                for name, at, fields in json.loads(line):
                    value = dict(fields)
                    value |= {n: tuple(map(Tokens.of_json, value[n])) for n in value.keys() & set(SCORED)}
                    if "said" in value:
                        value["said"] = Reply(tuple(value["said"][0]), value["said"][1])
                    parts.add({Key(name, at): value})
        assert len(list((tmp_path / "begun").glob("part-*"))) == 2
        observe_in(tmp_path / "begun")
        assert records(tmp_path / "begun") == records(whole)
        assert not list((tmp_path / "begun").glob("part-*"))

    def test_cut_off_within_any_line_loses_that_line_alone(self, tmp_path):
        rows = {
            Key("a", i): {"said": Reply((i,), text)} for i, text in enumerate(["é\u2028ü", "\u0085…\x0b", "日本\n"])
        }
        made = Records(tmp_path / "whole", {}, ALONE)
        for key, fields in rows.items():
            made.add({key: fields})
        content = (tmp_path / "whole" / "part-0.jsonl").read_bytes()
        made.gather()
        for cut in range(0, len(content), 4):
            folder = tmp_path / str(cut)
            folder.mkdir()
            (folder / "part-0.jsonl").write_bytes(content[:cut])
            again = Records(folder, {}, ALONE)
            assert len(again.found) in (content[:cut].count(b"\n") // 2, content[:cut].count(b"\n") // 2 + 1)
            missing = [key for key in rows if not again.have({key: ("said",)})]
            for key in missing:
                again.add({key: rows[key]})
            assert Records(folder, {}, ALONE).found == rows  # killed once more, right after
            again.gather()
            assert records(folder) == records(tmp_path / "whole")

    def test_of_another_observation_is_refused(self, whole):
        sets, lm = tiny_sets(), tiny_lm()
        other_template, other_end = tiny_lm(), tiny_lm()
        other_template.tokenizer.chat_template += " "
        other_end.model.generation_config.eos_token_id = 9
        longer = {**sets, "retain": replace(sets["retain"], max_new_tokens=6)}
        usual = {"lm": lm, "sets": sets, "reads": ASKED, "patch": tiny_weight_patch()}
        for name, change in {
            "patch": {"patch": tiny_weight_patch().at(0.5)},
            "patch ": {"patch": None},
            "asked": {"sets": longer},
            "asked ": {"reads": {"forget": ASKED["forget"]}},
            "model": {"lm": LM(make_hf(seed=1), make_tokenizer())},
            "dtype": {"lm": LM(make_hf().double(), make_tokenizer())},
            "tokenizer": {"lm": other_template},
            "ends": {"lm": other_end},
            "judge": {"judge": LM(make_hf(seed=1), make_tokenizer())},
        }.items():
            with pytest.raises(InvalidConfig, match=rf"another {name.strip()} .*use another folder"):
                observe(**{**usual, **change}, folder=whole)

    def test_does_not_mind_in_which_order_sets_are_named(self, whole):
        kept = records(whole)
        observe(tiny_lm(), tiny_sets(), dict(reversed(ASKED.items())), patch=tiny_weight_patch(), folder=whole)
        assert records(whole) == kept


def test_a_digest_changes_with_everything_that_a_patch_does():
    weight, feature = tiny_weight_patch(), feature_patch()
    other = FeaturePatch(dictionary=make_perfect_sae(), features=[1, 4], edit=DenseClamp(to=-4.0))
    stronger = FeaturePatch(dictionary=make_perfect_sae(), features=[1, 3], edit=DenseClamp(to=-5.0))
    found = [p.digest for p in (weight, weight.at(0.5), feature, other, stronger, Stack((weight, feature)))]
    assert len(set(found)) == len(found)
    assert feature_patch().digest == feature.digest
