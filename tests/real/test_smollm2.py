"""The real SmolLM2: every edit under every gate gives the same tokens however it is run, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from conftest import make_sae, n_hooks

from concept_unlearn.data.scope import Scope
from concept_unlearn.dictionaries import SAEDictionary, direction, load_dictionary, shipped
from concept_unlearn.edits import Clamp, DenseClamp, Edit, Mean, Refuse, Relative, Scale, Shift, Zero
from concept_unlearn.errors import MissingExtra, ModelNotFound
from concept_unlearn.features.stats import variance_explained
from concept_unlearn.gates import Always, Gate, ProbeGate, SequenceGate, Signal, StreamingGate, TokenGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.embedded import fetch
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
PROMPTS = ["In chess, the bishop and the queen both move", "The capital of France is", "Soup"]
FEATURES = (0, 1, 2, 3)
TOKENS = 8
EDITS = {
    "zero": Zero(), "scale": Scale(by=-2.0), "clamp": Clamp(to=Relative(-1.5)), "dense_clamp": DenseClamp(to=-40.0),
    "shift": Shift(by=Relative(-0.8)), "mean": Mean(values=(-20.0, 5.0, 0.0, -10.0)), "refuse": Refuse(to=Relative(2.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    try:
        return LM.load("smollm2", dtype="float32", device="cpu")
    except ModelNotFound:
        try:
            fetch("smollm2")
        except (ModelNotFound, MissingExtra) as error:
            pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")
    return LM.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def scope():
    return Scope.of("chess", forget=FORGET, retain=RETAIN, out_far=[])


def read(lm, text, site=SITE):
    ids = torch.tensor([lm.encode(text, chat=False)])
    return lm.activations(ids, torch.ones_like(ids, dtype=torch.bool), site)[site][0]


@pytest.fixture(scope="module")
def sae(lm):
    """A JumpReLU SAE whose features each fire near one token of the text to forget, and not on sinks."""
    forget, retain = (torch.cat([read(lm, t)[1:] for t in texts]) for texts in (FORGET, RETAIN))
    picks = torch.randperm(len(forget), generator=torch.Generator().manual_seed(0))[:16]
    near = forget[picks] - retain.mean(0)
    rows = torch.nn.functional.normalize(near, dim=-1)
    made = make_sae("jumprelu", d_in=lm.d_model, d_sae=len(rows), hook_name=str(SITE), apply_b_dec_to_input=True)
    with torch.no_grad():
        made.W_enc.copy_(rows.T)
        made.W_dec.copy_(rows)
        made.b_dec.copy_(retain.mean(0))
        made.b_enc.zero_()
        made.threshold.copy_(near.norm(dim=-1) / 3)
    dictionary = SAEDictionary(made.float())
    dictionary.max_norm = 5 * float(retain.norm(dim=-1).median())
    return dictionary


@pytest.fixture(scope="module")
def means(lm, scope):
    return Steer(sites=(SITE,))(lm, scope).slices[0]


@pytest.fixture(scope="module")
def gates(lm, sae, means):
    """Every gate, its threshold in the middle of what the prompts give: some open it and some do not."""
    chosen, found = sae.slice(FEATURES), {}
    for gate in (Always(), TokenGate(), SequenceGate(above=0), StreamingGate(above=0), ProbeGate(above=0)):
        values = []
        for prompt in PROMPTS:
            acts = (sensor(means) if gate.kind == "probe" else chosen).encode(read(lm, prompt)[None, 1:]).acts
            tokens = torch.ones(acts.shape[:-1], dtype=torch.bool)
            values.append(float(acts.amax() if gate.per_token else gate.statistic(Signal(acts, tokens, tokens))))
        middle = (min(values) + max(values)) / 2
        print(gate, values)
        assert max(values) > min(values)
        found[gate.kind] = gate if gate.kind == "always" else gate.model_copy(update={"above": middle})
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


@pytest.fixture(scope="module")
def untouched(lm, encoded):
    return lm.logits(torch.tensor([encoded[0]]))


def patch_for(sae, means, edit, gate):
    return FeaturePatch(
        dictionary=sae, features=FEATURES, edit=edit, gate=gate, sensor=sensor(means) if gate.kind == "probe" else None
    )


def test_these_tests_know_every_edit_and_every_gate(gates):
    assert EDITS.keys() == Edit.members.keys()
    assert gates.keys() == Gate.members.keys()


@pytest.mark.parametrize("gate", sorted(Gate.members))
@pytest.mark.parametrize("edit", sorted(EDITS))
def test_however_it_is_run_the_patch_gives_the_same_tokens(lm, sae, means, gates, encoded, base, edit, gate):
    """Cached, uncached, in a batch padded on the left, one by one."""
    import time

    patch = patch_for(sae, means, EDITS[edit], gates[gate])
    with patch.on(lm):
        t = time.time()
        together = lm.generate_ids(encoded, max_new_tokens=TOKENS)
        a = time.time()
        assert together == lm.generate_ids(encoded, max_new_tokens=TOKENS, use_cache=False)
        b = time.time()
        assert together == lm.generate_ids(encoded, max_new_tokens=TOKENS, batch_size=1)
        print(f"{a - t:.2f} {b - a:.2f} {time.time() - b:.2f}")
    print([lm.tokenizer.decode(t) for t in base])
    print([lm.tokenizer.decode(t) for t in together])
    assert together != base
