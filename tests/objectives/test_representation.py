from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, make_hf
from objectives.scenes import SITE, SPLITS, D, Scene, gradients, make_batch
from torch import nn

from concept_unlearn.errors import SiteNotFound
from concept_unlearn.lm import LM, Site
from concept_unlearn.objectives import RMU, RetainEmbedding
from concept_unlearn.objectives.representation import _direction

BOTH = pytest.mark.parametrize("member", [RMU, RetainEmbedding], ids=["rmu", "retain_embedding"])
PLACES = pytest.mark.parametrize("where", ["answer", "real", "own"])


@pytest.fixture
def scene() -> Scene:
    return Scene.random()


def said(member):
    return "forget" if member is RMU else "retain"


def targets(objective, scene):
    return 20 * _direction(0, D).double() if objective.kind == "rmu" else scene.h0["retain"]


@BOTH
@PLACES
def test_the_loss_is_the_mean_of_the_losses_of_single_sequences(member, where, scene):
    objective = member(where=where)
    alone = [scene.rows([i]).loss(objective) for i in range(8)]
    torch.testing.assert_close(scene.loss(objective), torch.stack(alone).mean())


@BOTH
@PLACES
def test_one_sequence_gives_the_mean_square_of_what_is_missing(member, where, scene):
    objective, split, one = member(where=where), said(member), scene.rows([2])
    use = one.batches[split].positions(where)
    expected = (one.h[split] - targets(objective, one)).square().mean(-1)[use].mean()
    torch.testing.assert_close(one.loss(objective), expected)


@BOTH
def test_nothing_is_missing_where_the_activations_are_the_target(member, scene):
    objective, split = member(), said(member)
    there = targets(objective, scene).expand_as(scene.h[split]).clone().requires_grad_()
    done = Scene(scene.batches, scene.z, scene.z0, {**scene.h, split: there}, scene.h0)
    assert done.loss(objective).item() == pytest.approx(0, abs=1e-12)
    assert gradients(done.loss(objective), {0: there})[0].abs().max() < 1e-7


@BOTH
def test_the_published_distance(member):
    rows = ((3, 4), (0, 1), (2, 5), (1, 1))  # of the second one nothing is predicted, but it is labelled
    scene = Scene.random(batches=dict.fromkeys(SPLITS, make_batch(*rows)))
    objective, split = member(compat="open-unlearning"), said(member)
    batch, h = scene.batches[split], scene.h[split]
    mask = batch.labels.where(batch.mask, -100) != -100
    squared_diff = (h - targets(objective, scene)).square()
    squared_diff_sum = (squared_diff * mask[..., None]).mean(2).sum(1)
    num_tokens = mask.sum(-1, keepdim=True)
    expected = (squared_diff_sum / num_tokens).mean()
    assert (squared_diff_sum / num_tokens).shape == (4, 4)
    torch.testing.assert_close(scene.loss(objective), expected)
    assert not torch.isclose(expected, scene.loss(member(where="own")))


def test_the_direction_is_positive_of_norm_one_and_drawn_once():
    u = _direction(3, 500)
    assert u.norm().item() == pytest.approx(1)
    assert (u >= 0).all()
    assert u.max() < 2 * u.mean() * 1.1  # uniform, so half of its largest is its mean
    assert _direction(3, 500) is u
    assert not torch.equal(_direction(4, 500), u)
    _direction.cache_clear()
    torch.manual_seed(17)
    assert torch.equal(_direction(3, 500), u)


@pytest.mark.parametrize("k", [1.0, 6.5, 20.0])
def test_the_target_has_the_norm_k(k, scene):
    at_zero = Scene(scene.batches, scene.z, scene.z0, {s: torch.zeros_like(h) for s, h in scene.h.items()}, scene.h0)
    assert at_zero.loss(RMU(k=k)).item() * D == pytest.approx(k**2)


def test_the_seed_chooses_the_direction(scene):
    assert torch.equal(scene.loss(RMU(seed=1)), scene.loss(RMU(seed=1)))
    assert not torch.isclose(scene.loss(RMU(seed=1)), scene.loss(RMU(seed=2)))


def test_half_precision_is_squared_in_full(scene):
    half = scene.map(lambda x: x.detach().half() * 300)
    assert half.loss(RetainEmbedding()).isfinite()
    assert half.loss(RetainEmbedding()) > torch.finfo(torch.half).max / D


@pytest.mark.parametrize(
    ("layers", "block"),
    [(1, 0), (2, 1), (3, 2), (6, 2), (12, 3), (16, 4), (24, 5), (30, 7), (32, 7), (48, 10), (80, 18)],
)
def test_the_site_is_as_deep_as_the_eighth_block_of_thirty_two(layers, block):
    lm = SimpleNamespace(n_layers=layers)
    sites = [read.what for o in (RMU(), RetainEmbedding()) for read in o.reads(lm)]
    assert sites == [Site("resid_post", block)] * 3
    assert RMU(site=SITE).reads(lm)[0].what == SITE


def mlp_outputs(kind: str) -> list[str]:
    name = {
        "gpt2": "transformer.h.{}.mlp.c_proj.weight",
        "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
        "hooked": "blocks.{}.mlp.W_out",
        "opt": "model.decoder.layers.{}.fc2.weight",
    }.get(kind, "model.layers.{}.mlp.down_proj.weight")
    return [name.format(i) for i in range(N_LAYERS)]


def test_it_trains_the_mlp_outputs_before_the_site(any_hf):
    names = mlp_outputs(any_hf.name)
    assert RMU().trains(any_hf) == tuple(names)
    assert RMU(site=Site("resid_post", 1)).trains(any_hf) == tuple(names[:2])
    assert RMU(site=Site("resid_pre", 1)).trains(any_hf) == tuple(names[:1])
    assert RetainEmbedding().trains(any_hf) is None


def test_it_finds_them_in_every_library(any_lm):
    found = RMU().trains(any_lm)
    assert set(found) <= {name for name, _ in any_lm.model.named_parameters()}
    plain = [name.replace("_original_component.", "") for name in found]
    assert plain == mlp_outputs("hooked" if any_lm.name == "tiny" else "llama")


def test_it_finds_the_second_layer_of_an_mlp_that_has_no_module_of_its_own():
    import transformers

    config = transformers.OPTConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    lm = LM(transformers.OPTForCausalLM(config))
    assert RMU().trains(lm) == tuple(f"model.decoder.layers.{i}.fc2.weight" for i in range(3))


def test_it_finds_it_where_it_is_not_the_last_matrix(tmp_path):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_mlp=32, d_vocab=8, act_fn="silu", gated_mlp=True
    )
    assert RMU().trains(LM(HookedTransformer(config))) == ("blocks.0.mlp.W_out", "blocks.1.mlp.W_out")


def test_it_finds_the_stacked_outputs_of_experts():
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_local_experts=2,
    )  # fmt: skip
    lm = LM(transformers.MixtralForCausalLM(config))
    shapes = dict(lm.model.named_parameters())
    assert [tuple(shapes[name].shape) for name in RMU().trains(lm)] == [(2, 16, 32)] * 2


def test_a_model_without_such_a_matrix_is_told_so():
    model = copy.deepcopy(make_hf())
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(D_MODEL, 5), nn.Linear(5, 7))
    with pytest.raises(SiteNotFound, match="the MLP of block 1 has no matrix"):
        RMU().trains(LM(model))
    with pytest.raises(SiteNotFound, match=r"no MLP comes before blocks\.0\.hook_resid_pre"):
        RMU(site=Site("resid_pre", 0)).trains(LM(model))


def test_a_transformer_of_attention_alone_is_told_so():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=8, attn_only=True)
    with pytest.raises(SiteNotFound, match="the MLP of block 0 has no matrix"):
        RMU().trains(LM(HookedTransformer(config)))
