"""Split, unlearn, merge: parts are disjoint and cover all, and each is unlearned as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workers import tiny_finetune, tiny_scope

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import InvalidConfig, InvalidData, UnknownName
from concept_unlearn.gates import Always
from concept_unlearn.lm.fingerprint import checksum
from concept_unlearn.methods import EUL, Method, Negate, SplitMerge, Steer, Study
from concept_unlearn.methods.split_merge import by_attribute
from concept_unlearn.patches import WeightPatch, fuse, merge
from concept_unlearn.patches.union import union
from concept_unlearn.training import Loop
from concept_unlearn.weights import Dense

BASE = tiny_finetune(max_steps=2)
LORA = tiny_finetune(max_steps=2, adapter={"r": 2, "target_modules": ["q_proj", "down_proj"]})
NAMES = ("a", "b", "c")


def named(scope, names):
    """The same with an attribute ``of``; None leaves a passage without it."""
    given = [names[i % len(names)] for i in range(len(scope.forget))]
    pairs = zip(scope.forget, given, strict=True)
    return replace(
        scope, forget=tuple(p.model_copy(update={"attributes": (("of", n),) if n else ()}) for p, n in pairs)
    )


@pytest.fixture
def scope():
    return named(tiny_scope(), NAMES)


def parts_by_hand(lm, scope, method=BASE):
    return [
        method(lm, replace(scope, forget=tuple(p for p in scope.forget if p.attribute("of") == name)))
        for name in sorted({p.attribute("of") for p in scope.forget})
    ]


class _Spy(Method):
    """Learns nothing, and tells what it was given."""

    kind = "spy"
    seed: int = 7

    def fit(self, study: Study) -> WeightPatch:
        SEEN.append((self.seed, study.scope, checksum(study.lm.model)))
        return WeightPatch({})


SEEN: list = []


class TestSplitting:
    @given(st.lists(st.sampled_from([None, "x", "y", "z"]), min_size=1, max_size=12).filter(any))
    def test_parts_are_disjoint_and_cover_all_in_order(self, values):
        passages = [Passage(text=str(i), attributes={"of": v} if v else {}) for i, v in enumerate(values)]
        parts = by_attribute(passages, "of", missing="other")
        assert sorted((p for part in parts.values() for p in part), key=passages.index) == passages
        assert list(parts) == sorted(parts)
        for name, part in parts.items():
            assert part
            assert {p.attribute("of") for p in part} == {None if name == "other" else name}
            assert list(part) == sorted(part, key=passages.index)

    def test_clusters_are_disjoint_and_cover_all(self, lm, scope):
        parts = SplitMerge(method=BASE, clusters=3).split(Study(lm, scope))
        assert list(parts) == ["cluster 1", "cluster 2", "cluster 3"]
        found = [p for part in parts.values() for p in part]
        assert len(found) == len(scope.forget)
        assert set(found) == set(scope.forget)

    def test_passages_without_the_attribute_are_counted_and_the_fix_is_named(self, lm):
        for names, says in (
            (("a", "b", None), r"3 of 10 passages to forget have no attribute 'of'; known: of.*missing=\"other\""),
            ((None,), r"10 of 10 .* no attribute 'of'; known: none.*split by another$"),
        ):
            with pytest.raises(InvalidData, match=says):
                SplitMerge(method=BASE, by="of")(lm, named(tiny_scope(), names))
        with pytest.raises(InvalidData, match="no attribute 'author'; known: of"):
            SplitMerge(method=BASE, by="author", missing="other")(lm, named(tiny_scope(), NAMES))
        with pytest.raises(InvalidData, match="has the value 'other'"):
            SplitMerge(method=BASE, by="of", missing="other")(lm, named(tiny_scope(), ("other", None)))

    def test_each_part_has_the_same_model_and_all_that_is_kept(self, lm, scope):
        SEEN.clear()
        SplitMerge(method=_Spy(), by="of")(lm, scope)
        assert len({weights for *_, weights in SEEN}) == 1
        for _, own, _ in SEEN:
            assert replace(own, forget=scope.forget) == scope

    def test_a_seed_goes_to_every_part(self, lm, scope):
        SEEN.clear()
        SplitMerge(method=_Spy(), by="of")(lm, scope)
        SplitMerge(method=SplitMerge(method=_Spy(), by="of"), by="of", seed=3)(lm, scope)
        assert [seed for seed, *_ in SEEN] == [7] * 3 + [3] * 3


class TestMerging:
    @pytest.mark.parametrize("method", [BASE, LORA, Negate(max_steps=2)], ids=["full", "lora", "negate"])
    @pytest.mark.parametrize("how", [{"by": "of"}, {"clusters": 1}], ids=["attribute", "cluster"])
    def test_one_part_is_plain_unlearning_to_the_last_bit(self, lm, method, how, tmp_path):
        scope = named(tiny_scope(), ("a",))
        plain = method(lm, scope)
        assert SplitMerge(method=method, **how)(lm, scope).digest == plain.digest
        assert SplitMerge(method=method, **how)(lm, scope, folder=tmp_path).digest == plain.digest

    @pytest.mark.parametrize("method", [BASE, LORA], ids=["full", "lora"])
    @pytest.mark.parametrize("rule", ["sum", "mean", "ties"])
    def test_parts_are_merged_as_full_changes(self, lm, scope, method, rule):
        found = SplitMerge(method=method, by="of", merge=rule)(lm, scope)
        assert found.digest == merge(parts_by_hand(lm, scope, method), rule).digest

    def test_parts_are_weighed_by_name_and_trimmed_and_scaled(self, lm, scope):
        parts = parts_by_hand(lm, scope)
        found = SplitMerge(method=BASE, by="of", merge="task_arithmetic", weights={"b": 0.25})(lm, scope)
        assert found.digest == merge(parts, "task_arithmetic", weights=[1, 0.25, 1]).digest
        found = SplitMerge(method=BASE, by="of", density=0.2, scale=0.5)(lm, scope)
        want = merge(parts, density=0.2)
        assert all(torch.equal(d.dense(), 0.5 * want.deltas[n].dense()) for n, d in found.deltas.items())

    def test_names_and_so_the_order_of_parts_do_not_matter(self, lm):
        scopes = [named(tiny_scope(), names) for names in (NAMES, ("c", "a", "b"))]
        one, two = (SplitMerge(method=BASE, by="of")(lm, scope) for scope in scopes)
        assert one.deltas.keys() == two.deltas.keys()
        assert all(torch.equal(d.dense(), two.deltas[n].dense()) for n, d in one.deltas.items())

    @pytest.mark.parametrize("settings", [{"scale": 0.0}, {"density": 0.0}])
    def test_at_no_scale_or_density_the_model_is_what_it_was(self, lm, scope, settings):
        assert not SplitMerge(method=BASE, by="of", **settings)(lm, scope).deltas

    def test_what_is_no_change_of_weights_is_refused(self, lm, scope):
        with pytest.raises(InvalidConfig, match="steer leaves a feature patch"):
            SplitMerge(method=Steer(sites=("resid_post.1",)), by="of")(lm, scope)

    def test_a_weight_of_no_part_is_refused(self, lm, scope):
        with pytest.raises(UnknownName, match="no part named 'd'; known: a, b, c"):
            SplitMerge(method=BASE, by="of", merge="task_arithmetic", weights={"d": 1.0})(lm, scope)


class TestStops:
    def test_what_was_stopped_goes_on_to_the_same_and_finished_parts_are_not_made_again(
        self, lm, scope, tmp_path, monkeypatch
    ):
        method = tiny_finetune(max_steps=4, checkpoint_every=1)
        whole, taken, take = SplitMerge(method=method, by="of")(lm, scope), [], Loop._take

        def counted(loop):
            if len(taken) == 6:
                taken.append("stopped")
                raise KeyboardInterrupt
            taken.append(loop.step)
            return take(loop)

        monkeypatch.setattr(Loop, "_take", counted)
        with pytest.raises(KeyboardInterrupt):
            SplitMerge(method=method, by="of")(lm, scope, folder=tmp_path)
        again = SplitMerge(method=method, by="of")(lm, scope, folder=tmp_path)
        assert taken == [0, 1, 2, 3, 0, 1, "stopped", 2, 3, 0, 1, 2, 3]
        assert again.digest == whole.digest

    def test_finished_parts_can_be_merged_another_way(self, lm, scope, tmp_path, monkeypatch):
        first = SplitMerge(method=BASE, by="of")(lm, scope, folder=tmp_path)
        monkeypatch.setattr(Loop, "_take", None)
        second = SplitMerge(method=BASE, by="of", merge="sum")(lm, scope, folder=tmp_path)
        assert second.digest != first.digest
        assert not list(tmp_path.glob("*/*.safetensors"))

    def test_a_folder_of_other_parts_is_refused(self, lm, scope, tmp_path):
        SplitMerge(method=_Spy(), by="of")(lm, scope, folder=tmp_path)
        for method, changed in (
            (SplitMerge(method=_Spy(seed=8), by="of"), scope),
            (SplitMerge(method=_Spy(), by="of"), named(scope, ("a", "b"))),
            (SplitMerge(method=_Spy(), by="of"), replace(scope, retain=scope.retain[1:])),
        ):
            with pytest.raises(InvalidConfig, match="holds another split"):
                method(lm, changed, folder=tmp_path)


def test_disjoint_changes_add_up(lm, scope, monkeypatch):
    def fit(self, study):
        change = torch.zeros(16, 32)
        change[NAMES.index(study.scope.forget[0].attribute("of"))] = 1.0
        return WeightPatch({"model.layers.1.mlp.down_proj.weight": Dense(change)})

    monkeypatch.setattr(_Spy, "fit", fit)
    (change,) = SplitMerge(method=_Spy(), by="of")(lm, scope).deltas.values()
    assert change.dense().sum() == 3 * 32
    assert change.dense().max() == 1


class TestOtherKinds:
    """Features are united, bans too, adapters are fused."""

    def parts(self, planted, method):
        scope = named(planted.scope, NAMES[:2])
        names = sorted({p.attribute("of") for p in scope.forget})
        made = [
            method(planted.lm, replace(scope, forget=tuple(p for p in scope.forget if p.attribute("of") == name)))
            for name in names
        ]
        return scope, made

    def suppress(self, planted, **changes):
        settings = {"dictionaries": (planted.second,), "n": 3, "score": "mean_difference", "edit": "dense_clamp"}
        return Method.parse({"kind": "suppress"} | settings | changes)

    @pytest.mark.parametrize("edit", ["dense_clamp", "mean"])
    def test_features_of_the_parts_are_edited_together(self, planted, edit):
        method = self.suppress(planted, edit=edit)
        scope, made = self.parts(planted, method)
        found = SplitMerge(method=method, by="of")(planted.lm, scope)
        assert found.digest == union(made).digest
        assert set(found.slices[0].features) == {f for p in made for f in p.slices[0].features}

    def test_codes_of_the_parts_are_banned_together(self, planted, codes):
        method = Method.parse({"kind": "ban", "codebook": codes, "n": 3})
        scope, made = self.parts(planted, method)
        found = SplitMerge(method=method, by="of")(planted.lm, scope)
        assert found.banned == tuple(sorted({code for p in made for code in p.banned}))

    def test_adapters_of_the_parts_are_fused(self, planted):
        method = EUL(layers=(1,), width=2, lr=1e-2, max_steps=4, batch_size=4, micro_batch=4, alternate=False)
        scope, made = self.parts(planted, method)
        assert SplitMerge(method=method, by="of")(planted.lm, scope).digest == fuse(made).digest

    def test_a_gate_is_fitted_once_on_the_whole(self, planted):
        gated, plain = (self.suppress(planted, gate=gate) for gate in ({"kind": "probe", "alpha": 0.2}, "always"))
        scope, made = self.parts(planted, plain)
        found = SplitMerge(method=gated, by="of")(planted.lm, scope)
        whole = gated(planted.lm, scope)
        assert (found.gate, found.sensor.spec()) == (whole.gate, whole.sensor.spec())
        assert replace(found, gate=Always(), sensor=None).digest == union(made).digest

    def test_one_part_is_the_method_alone(self, planted):
        method, scope = self.suppress(planted), named(planted.scope, ("a",))
        assert SplitMerge(method=method, by="of")(planted.lm, scope).digest == method(planted.lm, scope).digest

    def test_a_finished_part_is_not_made_again(self, planted, tmp_path, monkeypatch):
        method, scope = self.suppress(planted), named(planted.scope, NAMES[:2])
        first = SplitMerge(method=method, by="of")(planted.lm, scope, folder=tmp_path)
        monkeypatch.setattr(type(method), "fit", None)
        assert SplitMerge(method=method, by="of")(planted.lm, scope, folder=tmp_path).digest == first.digest

    @pytest.mark.parametrize("changes", [{"merge": "sum"}, {"density": 0.5}, {"scale": 0.5}], ids=str)
    def test_how_weights_are_merged_says_nothing_of_features(self, planted, changes):
        with pytest.raises(InvalidConfig, match=f"{next(iter(changes))} is of changes of weights"):
            SplitMerge(method=self.suppress(planted), by="of", **changes)(planted.lm, named(planted.scope, NAMES[:2]))
