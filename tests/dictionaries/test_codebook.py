"""The identities of a codebook: what bans, scales, ties, gradients and files may and may not change."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import D_MODEL

from concept_unlearn.dictionaries import Dictionary, as_dictionary, load_dictionary
from concept_unlearn.dictionaries.codebook import Codebook, straight_through
from concept_unlearn.errors import CorruptArtifact, InvalidConfig, NotExact
from concept_unlearn.lm import Site

X = torch.randn(3, 20, D_MODEL, generator=torch.Generator().manual_seed(0))
SITE = Site("resid_post", 1)
KINDS = {
    "cosine": {},
    "euclidean": {"distance": "euclidean"},
    "groups": {"sizes": (24, 24)},
    "uneven groups": {"sizes": (30, 10, 8, 12), "n_active": 3, "d_code": 24},
}


def make(*, sizes=(48,), n_active=4, **settings):
    return Codebook(site=SITE, d_in=D_MODEL, sizes=sizes, n_active=n_active, **settings).requires_grad_(False)


@pytest.fixture(params=list(KINDS))
def codebook(request):
    return make(**KINDS[request.param])


def used(codebook, x=X):
    """How often each code is chosen."""
    return (codebook.encode(x) > 0).flatten(0, -2).sum(0)


def some(codebook, n=8):
    """The codes that are chosen most, no more of a group than it can spare."""
    return tuple(used(codebook).sort(descending=True, stable=True).indices[:n].tolist())


class TestSelection:
    def test_it_writes_the_mean_of_the_nearest_codes(self, codebook):
        """Against the formulas, one token and one code at a time."""
        x = X[0, 0].double()
        z = (x @ codebook.W_enc.double() + codebook.b_enc.double()).relu()
        q, first = [], 0
        for part, size in zip(z.chunk(len(codebook.sizes)), codebook.sizes, strict=True):
            codes = codebook.codes[first : first + size].double()
            if codebook.distance == "cosine":
                near = [float(part @ c / (part.norm() * c.norm())) for c in codes]
            else:
                near = [-float((part - c).norm()) for c in codes]
            best = sorted(range(size), key=lambda k: -near[k])[: codebook.n_active]
            q.append(codes[best].mean(0))
            first += size
        want = torch.cat(q) @ codebook.W_dec.double() + codebook.b_dec.double()
        torch.testing.assert_close(codebook(X[0, 0]).double(), want, rtol=1e-5, atol=1e-5)

    def test_exactly_so_many_of_each_group_are_active(self, codebook):
        acts = codebook.encode(X)
        assert set(acts.unique().tolist()) == {0.0, acts.max().item()}
        for group in acts.split(codebook.sizes, -1):
            assert ((group > 0).sum(-1) == codebook.n_active).all()
            torch.testing.assert_close(group.sum(-1), torch.ones(X.shape[:-1]))

    def test_ties_go_to_the_lowest_id(self):
        codebook = make(sizes=(48,), n_active=3)
        codebook.codes[5:] = codebook.codes[4]
        nearest = codebook.similarity(codebook.hidden(X)).argmax(-1)
        ids = codebook.choose(codebook.similarity(codebook.hidden(X)))[..., 0, :]
        all_tied = nearest == 4
        assert all_tied.any()
        assert (ids[all_tied] == torch.tensor([4, 5, 6])).all()

    def test_codes_that_change_are_compared_as_they_are_now(self):
        codebook, z = make(), make().hidden(X)
        before = codebook.similarity(z)
        codebook.codes.copy_(codebook.codes.flip(0))
        torch.testing.assert_close(codebook.similarity(z), before.flip(-1))

    def test_nothing_read_is_no_similarity_and_the_first_codes(self):
        codebook = make()
        codebook.b_enc.fill_(-1e6)
        assert (codebook.similarity(codebook.hidden(X)) == 0).all()
        assert (codebook.choose(codebook.similarity(codebook.hidden(X))) == torch.arange(4)).all()
        assert codebook(X).isfinite().all()

    def test_a_code_of_norm_zero_has_no_similarity(self):
        codebook = make()
        codebook.codes[7] = 0
        assert (codebook.similarity(codebook.hidden(X))[..., 7] == 0).all()

    @pytest.mark.parametrize("by", [1e-3, 0.7, 3.0, 1e4])
    def test_under_cosine_neither_the_scale_of_z_nor_of_a_code_decides(self, by):
        codebook = make()
        codebook.b_enc.zero_()
        chosen, acts = some(codebook)[0], codebook.encode(X)
        assert torch.equal(codebook.encode(by * X), acts)
        torch.testing.assert_close(codebook(by * X), codebook(X))  # the magnitude is not passed on
        codebook.codes[chosen] *= by
        assert torch.equal(codebook.encode(X), acts)

    def test_under_euclidean_the_scale_of_a_code_decides(self):
        codebook = make(distance="euclidean")
        acts = codebook.encode(X)
        codebook.codes[some(codebook)[0]] *= 10
        assert not torch.equal(codebook.encode(X), acts)

    def test_groups_choose_each_for_itself(self):
        codebook = make(sizes=(24, 24))
        acts = codebook.encode(X)
        codebook.codes[24:] = codebook.codes[24:].flip(0)
        again = codebook.encode(X)
        assert torch.equal(again[..., :24], acts[..., :24])
        assert torch.equal(again[..., 24:], acts[..., 24:].flip(-1))

    def test_it_computes_in_float32_also_under_autocast_and_for_a_low_precision(self, codebook):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = codebook(X), codebook.encode(X), codebook.decode(codebook.encode(X), X)
        outside = codebook(X), codebook.encode(X), codebook.decode(codebook.encode(X), X)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
        assert torch.equal(codebook(X.bfloat16()), codebook(X.bfloat16().float()))


class TestBans:
    def test_no_ban_changes_nothing(self, codebook):
        for mode in ("refill", "zero"):
            assert torch.equal(codebook(X, (), mode=mode), codebook(X))

    @pytest.mark.parametrize("mode", ["refill", "zero"])
    def test_banning_codes_that_never_fire_changes_nothing(self, codebook, mode):
        unused = (used(codebook, X[0]) == 0).nonzero()[:, 0].tolist()
        banned = [i for i in unused if i % 2]
        assert banned
        assert torch.equal(codebook(X[0], banned, mode=mode), codebook(X[0]))
        assert not torch.equal(codebook(X, some(codebook), mode=mode), codebook(X))

    def test_zero_with_all_codes_banned_forgets_the_input(self, codebook):
        out = codebook(X, range(codebook.n_features), mode="zero")
        assert torch.equal(out, codebook.b_dec.expand_as(out))

    def test_refill_leaves_as_many_active_and_none_banned(self, codebook):
        banned = some(codebook)
        ids = codebook.choose(codebook.similarity(codebook.hidden(X)), codebook.mask(banned))
        assert not set(ids.flatten().tolist()) & set(banned)
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
        assert ids.shape[-2:] == (len(codebook.sizes), codebook.n_active)

    def test_prune_is_refill_bit_for_bit(self, codebook):
        banned = some(codebook)
        pruned = codebook.pruned(banned)
        assert pruned.n_features == codebook.n_features - len(banned)
        assert torch.equal(pruned(X), codebook(X, banned))
        assert not (pruned.codes[:, None] == codebook.codes[list(banned)]).all(-1).any()
        assert torch.equal(codebook.pruned(())(X), codebook(X))

    def test_what_zero_leaves_is_divided_by_all_or_by_the_rest(self):
        codebook = make()
        banned = some(codebook, 3)
        rest = codebook.encode(X)
        rest[..., list(banned)] = 0
        torch.testing.assert_close(codebook(X, banned, mode="zero"), codebook.decode(rest, X))
        again = rest / rest.sum(-1, keepdim=True).clamp(min=1e-9)
        torch.testing.assert_close(codebook(X, banned, mode="zero", renormalise=True), codebook.decode(again, X))

    def test_refill_needs_enough_codes_in_every_group(self):
        codebook = make(sizes=(6, 42))
        assert codebook(X, [0, 1]).isfinite().all()
        with pytest.raises(InvalidConfig, match="leave 3 codes of a group of codebook; it needs 4"):
            codebook(X, [0, 1, 2])
        with pytest.raises(InvalidConfig, match="needs 4"):
            codebook.pruned([0, 1, 2])
        assert codebook(X, range(6), mode="zero").isfinite().all()

    @pytest.mark.parametrize("banned", [[48], [-1], [1, 1]])
    def test_bad_ids_are_named(self, banned):
        with pytest.raises(InvalidConfig, match=r"of codebook|codebook has"):
            make()(X, banned)


class TestGradients:
    def test_straight_through_is_the_identity(self):
        codebook = make().requires_grad_(True)
        z = codebook.hidden(X).detach().requires_grad_(True)
        q = codebook.average(codebook.choose(codebook.similarity(z)))
        through = straight_through(q, z)
        assert torch.equal(through, q)
        weight = torch.randn_like(q)
        grad_z, grad_codes = torch.autograd.grad((through * weight).sum(), (z, codebook.codes))
        assert torch.equal(grad_z, weight)
        torch.testing.assert_close(grad_codes, (codebook.encode(X).flatten(0, 1).T @ weight.flatten(0, 1)))

    def test_codes_learn_of_the_task_unless_told_not_to(self):
        codebook = make().requires_grad_(True)
        for learns in (True, False):
            passed = codebook.bottleneck(X, codes_learn=learns)
            assert torch.equal(passed.out, codebook(X))
            codebook.zero_grad()
            passed.out.square().sum().backward()
            assert (codebook.codes.grad is not None) == learns
            assert codebook.W_enc.grad.abs().sum() > 0


class TestDictionary:
    def test_it_is_one(self, codebook):
        assert isinstance(codebook, Dictionary)
        assert as_dictionary(codebook) is codebook
        assert (codebook.n_features, codebook.d_in, codebook.site) == (sum(codebook.sizes), D_MODEL, SITE)
        assert codebook.to(torch.device("cpu")) is codebook

    def test_decoding_what_is_encoded_is_a_pass(self, codebook):
        torch.testing.assert_close(codebook.decode(codebook.encode(X), X), codebook(X))

    def test_it_has_no_slice(self, codebook):
        with pytest.raises(NotExact, match=r"compete for . places: use CodebookPatch or the ban method"):
            codebook.slice([1])

    def test_rescaling_moves_the_unit_of_what_is_read_and_written(self, codebook):
        larger = codebook.rescaled(50.0)
        torch.testing.assert_close(larger(50 * X), 50 * codebook(X), rtol=1e-4, atol=1e-3)

    def test_a_frozen_copy_is_its_own(self):
        codebook = make().requires_grad_(True)
        frozen = codebook.frozen()
        assert not any(p.requires_grad for p in frozen.parameters())
        frozen.codes.zero_()
        assert codebook.codes.any()

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"sizes": (10, 3)}, "4 codes cannot be active in a group that has 3"),
            ({"sizes": (10, 10, 10)}, "3 groups of codes do not divide d_code 16"),
            ({"n_active": 0}, "0 codes cannot be active"),
        ],
    )
    def test_sizes_that_do_not_fit(self, settings, says):
        with pytest.raises(InvalidConfig, match=says):
            make(**settings)


class TestSaved:
    @pytest.fixture
    def folder(self, tmp_path):
        make(sizes=(24, 24), max_norm=9.0, model_name="tiny", model_fingerprint="f00").save(tmp_path / "codes")
        return tmp_path / "codes"

    def test_a_folder_computes_what_it_was_saved_with(self, codebook, tmp_path):
        codebook.save(tmp_path / "codes")
        found = load_dictionary(tmp_path / "codes")
        assert isinstance(found, Codebook)
        assert found.spec() == codebook.spec() | {"name": "codes"}
        assert torch.equal(found(X), codebook(X))
        assert not any(p.requires_grad for p in found.parameters())

    def test_it_says_what_it_is_and_where_it_belongs(self, folder):
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"] == "codebook"
        assert config["site"] == "blocks.1.hook_resid_post"
        assert (config["model_name"], config["model_fingerprint"], config["max_norm"]) == ("tiny", "f00", 9.0)
        assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "codebook.safetensors"]
        assert load_dictionary(folder, site="resid_pre.2").site == Site("resid_pre", 2)

    @pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "other", "key"])
    def test_damage_is_noticed(self, folder, damage):
        weights, config = folder / "codebook.safetensors", folder / "cfg.json"
        content, data = weights.read_bytes(), json.loads(config.read_text())
        match damage:
            case "flip":
                weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            case "truncate":
                weights.write_bytes(content[:-10])
            case "delete":
                weights.unlink()
            case "other":
                config.write_text(json.dumps(data | {"sizes": [20, 20]}))
            case "key":
                config.write_text(json.dumps({k: v for k, v in data.items() if k != "n_active"} | {"n_activ": 3}))
        with pytest.raises(CorruptArtifact, match="codes"):
            load_dictionary(folder)
