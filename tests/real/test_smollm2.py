"""The real SmolLM2: every edit under every gate gives the same tokens however it is run, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from conftest import make_sae, n_hooks

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary, direction, load_dictionary, shipped
from concept_unlearn.edits import Clamp, DenseClamp, Edit, Mean, Refuse, Relative, Scale, Shift, Zero
from concept_unlearn.features.stats import variance_explained
from concept_unlearn.gates import Always, Gate, ProbeGate, SequenceGate, Signal, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.methods import Steer
from concept_unlearn.patches import FeaturePatch

pytestmark = pytest.mark.slow

SITE = Site("resid_post", 9)
FORGET = [
    "The queen is the most powerful piece in chess.", "White opened with the pawn to e4 and castled early.",
    "A knight forks the king and the rook.", "The bishop moves along the diagonals of the board.",
]  # fmt: skip
RETAIN = [
    "The soup was hot, so we waited a while.", "Rain fell on the hills all through the night.",
    "Paris is the capital and largest city of France.", "She learned to play the piano when she was six.",
]  # fmt: skip
PROMPTS = ["In chess, the bishop", "Hot soup"]
PHRASES = ["She plays chess", "The white bishop", "The white queen", "The black king", "Heavy rain", "A piano"]
FEATURES = (0, 1, 2, 3)
TOKENS = 8
EDITS = {
    "zero": Zero(), "scale": Scale(by=-2.0), "clamp": Clamp(to=Relative(-1.5)), "dense_clamp": DenseClamp(to=-40.0),
    "shift": Shift(by=Relative(-0.8)), "mean": Mean(values=(-20.0, 5.0, 0.0, -9.0)), "refuse": Refuse(to=Relative(4.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def scope():
    return Scope.of("chess", forget=FORGET, retain=RETAIN, out_far=[])


def read(lm, text, site=SITE):
    ids = torch.tensor([lm.encode(text, chat=False)])
    return lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site][0]


@pytest.fixture(scope="module")
def sae(lm):
    """A JumpReLU SAE whose features each fire near the last token of a phrase, and not on sinks."""
    retain = torch.cat([read(lm, text)[1:] for text in RETAIN])
    near = torch.stack([read(lm, phrase)[-1] for phrase in PHRASES]) - retain.mean(0)
    rows = torch.nn.functional.normalize(near, dim=-1)
    made = make_sae("jumprelu", d_in=lm.d_model, d_sae=len(rows), hook_name=str(SITE), apply_b_dec_to_input=True)
    with torch.no_grad():
        made.W_enc.copy_(rows.T)
        made.W_dec.copy_(rows)
        made.b_dec.copy_(retain.mean(0))
        made.b_enc.zero_()
        made.threshold.copy_(near.norm(dim=-1) / 2)
    dictionary = SAEDictionary(made.to(dtype=torch.float32))
    dictionary.max_norm = 5 * float(retain.norm(dim=-1).median())
    return dictionary


@pytest.fixture(scope="module")
def means(lm, scope):
    return Steer(sites=(SITE,))(lm, scope).slices[0]


@pytest.fixture(scope="module")
def gates(lm, sae, means):
    """Every gate, its threshold half way between the prompts: the one about chess opens it, the other does not."""
    chosen, found = sae.slice(FEATURES), {}
    for gate in (Always(), TokenGate(), SequenceGate(above=0), StreamingGate(above=0), ProbeGate(above=0)):
        values = []
        for prompt in PROMPTS:
            x, reads = read(lm, prompt)[None], sensor(means) if gate.kind == "probe" else chosen
            acts, tokens = reads.encode(x).acts, x.norm(dim=-1) <= reads.max_norm
            values.append(
                float(acts[tokens].amax() if gate.per_token else gate.statistic(Signal(acts, tokens, tokens)))
            )
        assert values[0] > values[1]
        found[gate.kind] = gate if gate.kind == "always" else gate.model_copy(update={"above": sum(values) / 2})
    return found


def sensor(means):
    r = means.W_dec[0]
    return direction(SITE, r, r, normalisation="constant_norm_rescale", max_norm=means.max_norm)


@pytest.fixture(scope="module")
def encoded(lm):
    return [lm.encode(p, chat=False) for p in PROMPTS]


@pytest.fixture(scope="module")
def base(lm, encoded):
    return lm.generate_ids(encoded, max_new_tokens=TOKENS)


def patch_for(sae, means, edit, gate):
    return FeaturePatch(
        dictionary=sae, features=FEATURES, edit=edit, gate=gate, sensor=sensor(means) if gate.kind == "probe" else None
    )


def test_these_tests_know_every_edit_and_every_gate(gates):
    assert EDITS.keys() == Edit.members.keys()
    assert gates.keys() == Gate.members.keys()


@pytest.mark.parametrize("gate", sorted(Gate.members))
@pytest.mark.parametrize("edit", sorted(Edit.members))
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, sae, means, gates, encoded, base, edit, gate):
    """Cached = uncached = in a batch padded on the left = one by one, and only text about chess is touched."""
    with patch_for(sae, means, EDITS[edit], gates[gate]).on(lm):
        together = lm.generate_ids(encoded, max_new_tokens=TOKENS)
        assert together == lm.generate_ids(encoded, max_new_tokens=TOKENS, use_cache=False)
        assert together == lm.generate_ids(encoded, max_new_tokens=TOKENS, batch_size=1)
    assert together[0] != base[0]
    if gate in ("sequence", "probe"):  # decided on the prompt; the others may open on what is written
        assert together[1] == base[1]


@pytest.mark.parametrize("edit", [Zero(), Shift(by=-2.0)], ids=lambda e: e.kind)
def test_a_direction_does_so_too_on_chat_and_plain_prompts(lm, means, edit):
    """One batch of a rendered chat turn and bare text, lengths far apart."""
    prompts = [lm.encode("Which chess piece is strongest?", chat=True), lm.encode(PROMPTS[0], chat=False)]
    assert len(prompts[0]) > 4 * len(prompts[1])
    base = lm.generate_ids(prompts, max_new_tokens=TOKENS)
    with FeaturePatch(slices=(means,), edit=edit).on(lm):
        together = lm.generate_ids(prompts, max_new_tokens=TOKENS)
        assert together == lm.generate_ids(prompts, max_new_tokens=TOKENS, use_cache=False)
        assert together == lm.generate_ids(prompts, max_new_tokens=TOKENS, batch_size=1)
    assert all(after != before for after, before in zip(together, base, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("gate", sorted(Gate.members))
def test_taken_off_it_leaves_the_logits_bit_for_bit_as_they_were(lm, sae, means, gates, encoded, gate):
    ids, patch = torch.tensor([encoded[0]]), patch_for(sae, means, EDITS["dense_clamp"], gates[gate])
    before = lm.logits(ids)

    def fail(x, _):
        raise RuntimeError("in the middle of a pass")

    with patch.on(lm):
        assert not torch.allclose(lm.logits(ids), before)
    assert torch.equal(lm.logits(ids), before)
    with pytest.raises(RuntimeError, match="in the middle"), patch.on(lm), lm.edit({Site("resid_post", 20): fail}):
        lm.logits(ids)
    assert torch.equal(lm.logits(ids), before)
    assert n_hooks(lm.model) == 0


@torch.no_grad()
def test_loaded_in_bfloat16_it_takes_a_float32_sae_and_feels_the_same_effect(lm, sae, means, gates, encoded):
    low, ids = LM.load("smollm2", dtype="bfloat16", device="cpu"), torch.tensor([encoded[0]])
    patch = patch_for(sae, means, EDITS["dense_clamp"], gates["probe"])
    effects = []
    for model in (lm, low):
        before = model.logits(ids)
        with patch.on(model):
            after = model.logits(ids)
            assert after.dtype == model.dtype
        effects.append((after - before).float().flatten())
        assert torch.equal(model.logits(ids), before)
    assert low.fingerprint == lm.fingerprint
    assert torch.cosine_similarity(*effects, dim=0) > 0.95


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("smollm2/")])
def test_a_shipped_dictionary_explains_most_of_what_it_reads(lm, name):
    dictionary = load_dictionary(name)
    x = torch.cat([read(lm, text, dictionary.site) for text in (*FORGET, *RETAIN)])
    x = x[x.norm(dim=-1) <= dictionary.max_norm]
    assert variance_explained(x, dictionary.decode(dictionary.encode(x), x)) > 0.5
