"""Sites on every kind of model: what is read is what the model computes, and leaving restores it bit for bit."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import N_LAYERS, make_bridge, make_hf, make_tokenizer, n_hooks
from torch import nn

from concept_unlearn.errors import NonFinite, PatchNotReached, SiteNotFound
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.locate import blocks
from concept_unlearn.lm.site import STREAMS


def everywhere(ids):
    return torch.ones_like(ids, dtype=torch.bool)


@pytest.mark.parametrize("stream", STREAMS)
def test_an_identity_edit_changes_no_bit_and_a_real_one_shows(any_hf, ids, stream):
    site = Site(stream, 1)
    base = any_hf.logits(ids)
    with any_hf.edit({site: lambda x, _: x}):
        assert torch.equal(any_hf.logits(ids), base)
    with any_hf.edit({site: lambda x, _: torch.zeros_like(x)}):
        assert not torch.allclose(any_hf.logits(ids), base)
    assert torch.equal(any_hf.logits(ids), base)
    assert n_hooks(any_hf.model) == 0


@pytest.mark.parametrize("stream", ["resid_pre", "resid_post", "attn_out", "mlp_out", "hook_z"])
def test_sites_work_on_every_library(any_lm, ids, stream):
    site = Site(stream, 1)
    base = any_lm.logits(ids)
    seen = any_lm.activations(ids, everywhere(ids), site)[site]
    assert seen.shape == (*ids.shape, any_lm.d_model)
    with any_lm.edit({site: lambda x, _: x.clone()}):
        assert torch.equal(any_lm.logits(ids), base)
    with any_lm.edit({site: lambda x, _: torch.zeros_like(x)}):
        assert not torch.allclose(any_lm.logits(ids), base)
    assert torch.equal(any_lm.logits(ids), base)


def test_the_residual_stream_is_the_models_hidden_states(any_hf, ids):
    sites = [Site("resid_pre", layer) for layer in range(N_LAYERS)]
    seen = any_hf.activations(ids, everywhere(ids), *sites)
    hidden = any_hf.model(ids, output_hidden_states=True).hidden_states
    for site in sites:
        torch.testing.assert_close(seen[site], hidden[site.layer])


def test_the_branches_add_up_to_the_residual(any_hf, ids):
    """resid_post = resid_pre + attn_out + mlp_out, norms after a branch included."""
    sites = {s: Site(s, 1) for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")}
    seen = any_hf.activations(ids, everywhere(ids), *sites.values())
    total = seen[sites["resid_pre"]] + seen[sites["attn_out"]] + seen[sites["mlp_out"]]
    torch.testing.assert_close(total, seen[sites["resid_post"]])


def make_opt_bridge(folder):
    from transformer_lens.model_bridge import TransformerBridge

    make_hf("opt").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), tokenizer=tokenizer)


@pytest.mark.parametrize("library", ["hf", "bridge"])
@pytest.mark.parametrize("stream", ["mlp_in", "mlp_out"])
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
def test_rows_of_a_flattened_batch_come_as_batch_and_sequence(library, stream, ids, tmp_path):
    """OPT runs its feed-forward on [batch * seq, d]: what an edit sees and writes is that of its sequence and token."""
    lm = LM(make_opt_bridge(tmp_path) if library == "bridge" else make_hf("opt"), make_tokenizer())
    site, seen = Site(stream, 1), []

    def edit(x, context):
        seen.append((x.shape, context.tokens.shape))
        return torch.where((torch.arange(2)[:, None] == 1)[..., None], 2.0 * x, x)  # the second sequence only

    base = lm.logits(ids)
    alone = lm.activations(ids[1:], everywhere(ids[1:]), site)[site]
    assert torch.allclose(lm.activations(ids, everywhere(ids), site)[site][1:], alone, atol=1e-5)
    with lm.edit({site: edit}):
        found = lm.logits(ids)
    assert seen == [((*ids.shape, lm.d_model), ids.shape)]
    if library == "hf":
        assert torch.equal(found[0], base[0])
    torch.testing.assert_close(found[0], base[0])  # an edited norm of a bridge is computed anew, in Python
    assert not torch.allclose(found[1], base[1])
    with lm.edit({site: lambda x, _: x}):
        assert torch.equal(lm.logits(ids), base)


def test_heads_come_flattened_before_the_output_projection(lm, ids):
    site = Site("hook_z", 1)
    z = lm.activations(ids, everywhere(ids), site)[site]
    attention = blocks(lm.model)[1].self_attn
    with lm.read(Site("attn_out", 1)) as seen:
        lm.logits(ids)
    torch.testing.assert_close(attention.o_proj(z), seen[Site("attn_out", 1)])


def test_the_pass_stops_after_the_deepest_site(lm, ids):
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks(lm.model))]
    head = lm.model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    lm.activations(ids, everywhere(ids), Site("resid_post", 0), Site("attn_out", 1))
    for handle in (*handles, head):
        handle.remove()
    assert ran == [0]  # block 1 was entered for its attention and left before its end


def test_several_sites_are_read_in_one_pass(lm, ids):
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    lm.activations(ids, everywhere(ids), *[Site("resid_post", i) for i in range(N_LAYERS)])
    handle.remove()
    assert len(calls) == 1


def test_hooks_are_removed_after_an_error_and_foreign_hooks_survive(lm, ids):
    foreign = lm.model.model.layers[1].register_forward_hook(lambda *_: None)
    base = lm.logits(ids)

    def fail(x, _):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), lm.edit({Site("resid_post", 1): fail}):
        lm.model.generate(ids, max_new_tokens=2)
    assert n_hooks(lm.model) == 1
    foreign.remove()
    assert torch.equal(lm.logits(ids), base)


def test_an_edit_never_changes_the_tensor_it_was_given(lm, ids):
    site, originals = Site("resid_post", 1), []

    def edit(x, _):
        originals.append((x, x.clone()))
        return x * 2

    with lm.edit({site: edit}):
        lm.logits(ids)
    x, copy = originals[0]
    assert torch.equal(x, copy)


def test_blocks_that_return_tuples_keep_what_else_they_return(ids):
    """transformers before 5, and attention modules still."""

    class Old(nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1, "cache"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Old(), Old()])
            self.weight = nn.Parameter(torch.zeros(1))
            self.config = type("C", (), {"num_hidden_layers": 2, "get_text_config": lambda self, **_: self})()

        def forward(self, x):
            for layer in self.layers:
                x, rest = layer(hidden_states=x)
                assert rest == "cache"
            return x

    model, x = Model(), torch.zeros(2, 3, 4)
    lm = LM(model)
    with lm.edit({Site("resid_post", 0): lambda x, _: x * 10, Site("resid_pre", 1): lambda x, _: x + 5}):
        assert torch.equal(model(x), torch.full_like(x, 16.0))
    assert torch.equal(model(x), torch.full_like(x, 2.0))


@pytest.mark.parametrize("site", ["resid_post.3", "resid_post.99"])
def test_a_layer_beyond_the_last_says_what_there_is(any_lm, ids, site):
    before = n_hooks(any_lm.model)
    with pytest.raises(SiteNotFound, match="layers 0 to 2"), any_lm.edit({Site.parse(site): lambda x, _: x}):
        pass
    assert n_hooks(any_lm.model) == before


def test_a_stream_that_the_architecture_lacks_says_what_the_block_has():
    import transformers

    config = transformers.MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4)
    lm = LM(transformers.AutoModelForCausalLM.from_config(config))
    assert isinstance(lm.locate(Site("resid_post", 1)), nn.Module)
    with pytest.raises(SiteNotFound, match="mixer"):
        lm.locate(Site("attn_out", 1))


def test_a_branch_that_contains_the_residual_is_refused():
    import transformers

    config = transformers.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2)
    lm = LM(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(SiteNotFound, match="adds the residual itself"):
        lm.locate(Site("mlp_out", 1))


def test_experts_are_not_mistaken_for_blocks():
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert blocks(model) is model.model.layers


def test_not_a_number_is_reported_with_its_site(lm, ids):
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFinite, match=r"blocks\.1\.hook_resid_post"):
        lm.activations(ids, everywhere(ids), Site("resid_post", 1))


def test_swapped_weights_come_back_by_pointer(lm, ids):
    base = lm.logits(ids)
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = dict(lm.model.named_parameters())[name]
    storage = parameter.data_ptr()
    with lm.swap({name: torch.zeros_like(parameter)}):
        assert not torch.allclose(lm.logits(ids), base)
    with pytest.raises(RuntimeError), lm.swap({name: torch.zeros_like(parameter)}):
        raise RuntimeError
    assert parameter.data_ptr() == storage
    assert torch.equal(lm.logits(ids), base)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    def test_hook_first_then_compile_gives_the_edited_model(self, lm, ids):
        with torch.no_grad(), lm.edit({Site("resid_post", 1): lambda x, _: x * 2}):
            want = lm.logits(ids)
            compiled = torch.compile(lm.model, backend="eager")
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)

    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_hook_added_after_a_compiled_call_is_refused_loudly(self, lm, ids, in_place):
        with torch.no_grad():
            if in_place:
                lm.model.compile(backend="eager")
            model = lm.model if in_place else torch.compile(lm.model, backend="eager")
            model(ids, use_cache=False)
        with (
            pytest.raises(PatchNotReached, match="before the first compiled call"),
            LM(model, make_tokenizer()).edit({Site("resid_post", 1): lambda x, _: x}),
        ):
            pass

    def test_a_compiled_wrapper_elsewhere_is_warned_of(self, lm, ids):
        with torch.no_grad():
            torch.compile(lm.model, backend="eager")(ids, use_cache=False)
        with pytest.warns(UserWarning, match="ignores hooks"), lm.edit({Site("resid_post", 1): lambda x, _: x}):
            pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_survives_dtype_and_tells_models_apart(tmp_path, dtype):
    one, other = LM(make_hf(seed=0).to(torch.bfloat16)), LM(make_hf(seed=1))
    one.model.save_pretrained(tmp_path)
    again = LM(type(one.model).from_pretrained(tmp_path, dtype=dtype))
    assert again.fingerprint == one.fingerprint != other.fingerprint


def test_a_bridge_has_the_fingerprint_of_its_model(tmp_path):
    assert LM(make_bridge(tmp_path)).fingerprint == LM(make_hf()).fingerprint


def test_a_finetuned_model_has_another_fingerprint(lm):
    before = lm.fingerprint
    with torch.no_grad():
        for parameter in lm.model.model.layers[2].parameters():
            parameter.mul_(1.05)
    assert LM(lm.model).fingerprint != before
