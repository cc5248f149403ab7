"""A codebook trained in its place in a live model: the model is borrowed and given back, and it unlearns a topic."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from conftest import D_MODEL, PAD, make_hf, make_tokenizer, n_hooks
from torch.nn.functional import cross_entropy

from concept_unlearn.dictionaries.architecture import Job
from concept_unlearn.dictionaries.codebook_in_model import train_in_model
from concept_unlearn.dictionaries.codebook_training import CodebookArchitecture
from concept_unlearn.errors import EmptyData, NonFinite
from concept_unlearn.features import EnrichmentScore, Stats, select
from concept_unlearn.features.stats import CorpusFitter
from concept_unlearn.lm import LM, Site
from concept_unlearn.patches import CodebookPatch

SITE = Site("resid_post", 1)


def started(lm, site, rows, **settings):
    """As it is before the first step of training on rows."""
    job = Job(
        site=site, d_in=rows.shape[1], n_steps=1, batch=1, lr=1e-3, warm_up_steps=0, decay_steps=0, seed=0,
        device=lm.device, max_norm=float("inf"), model_name=lm.name, model_fingerprint=lm.fingerprint,
    )  # fmt: skip
    return CodebookArchitecture(**settings)(job, rows).dictionary()


def batches(n, seed=0):
    """Padded on the right, in lengths 5 to 9."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        ids = torch.randint(6, 48, (8, 9), generator=generator)
        mask = torch.arange(9)[None] < torch.randint(5, 10, (8, 1), generator=generator)
        yield {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}


@pytest.fixture
def codebook(lm):
    batch = next(batches(1))
    x = lm.activations(batch["input_ids"], batch["attention_mask"].bool(), SITE)[SITE]
    return started(lm, SITE, x[batch["attention_mask"].bool()], n_codes=32, n_active=2)


def look(model):
    return (
        {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
    )


def assert_alike(found, want):
    assert found[1] == want[1]
    for name, (value, wanted, gradient) in want[0].items():
        assert torch.equal(found[0][name][0], value)
        assert found[0][name][1] == wanted
        assert found[0][name][2] is gradient


@pytest.fixture
def odd(lm):
    """A model in a state of its own: some modules in train mode, a parameter frozen, another with a gradient."""
    lm.model.model.layers[0].train()
    lm.model.lm_head.weight.requires_grad_(False)
    lm.model.model.norm.weight.grad = torch.ones(D_MODEL)
    return lm


class TestFrozen:
    def test_the_bottleneck_learns_and_nothing_else_changes(self, odd, codebook):
        before, given, seen = look(odd.model), codebook.state_dict(), []
        kept = {name: value.clone() for name, value in given.items()}
        found = train_in_model(
            odd, [*batches(1)] * 40, codebook, lr=3e-3, log=lambda step, losses: seen.append((step, losses))
        )
        assert_alike(look(odd.model), before)
        assert n_hooks(odd.model) == 0
        assert all(torch.equal(value, kept[name]) for name, value in given.items())
        assert not any(p.requires_grad for p in found.parameters())
        assert found.spec() == codebook.spec()
        assert [step for step, _ in seen] == list(range(1, 41))
        assert set(seen[0][1]) == {"kl", "reconstruction", "codes"}
        assert seen[-1][1]["kl"] < 0.8 * seen[0][1]["kl"]

    def test_an_error_gives_the_model_back_too(self, odd, codebook):
        before = look(odd.model)
        with pytest.raises(IndexError):
            train_in_model(odd, itertools.chain(batches(1), [{"input_ids": torch.tensor([[7, 1000]])}]), codebook)
        assert_alike(look(odd.model), before)
        assert n_hooks(odd.model) == 0

    def test_padding_teaches_nothing(self, lm, codebook):
        """What stands under the padding mask is free to be anything."""
        (batch,) = batches(1)
        other = batch["input_ids"].where(batch["attention_mask"].bool(), 11)
        one = train_in_model(lm, [batch], codebook)
        two = train_in_model(lm, [batch | {"input_ids": other}], codebook)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], value)

    @pytest.mark.parametrize("loss", ["base", "vqvae", "fullaeloss"])
    def test_every_loss_trains(self, lm, codebook, loss):
        found = train_in_model(lm, batches(3), codebook, loss=loss, commitment=0.25)
        assert all(not torch.equal(v, codebook.state_dict()[n]) for n, v in found.state_dict().items())

    def test_a_low_precision_model(self, codebook):
        lm = LM(make_hf().to(torch.bfloat16), make_tokenizer())
        assert all(v.isfinite().all() for v in train_in_model(lm, batches(2), codebook).state_dict().values())


class TestJoint:
    def test_model_and_bottleneck_learn_together(self, odd, codebook):
        before, seen = look(odd.model), []
        (batch,) = batches(1)
        train_in_model(odd, [batch] * 30, codebook, regime="joint", lr=3e-3, log=lambda _, losses: seen.append(losses))
        after = look(odd.model)
        assert after[1] == before[1]
        for name, (value, wanted, gradient) in before[0].items():
            assert after[0][name][1] == wanted
            assert after[0][name][2] is gradient
            assert torch.equal(after[0][name][0], value) == (not wanted)
        assert seen[-1]["cross_entropy"] < 0.7 * seen[0]["cross_entropy"]


def test_nothing_to_train_on(lm, codebook):
    with pytest.raises(EmptyData, match="no batch"):
        train_in_model(lm, [], codebook)


def test_a_loss_that_is_no_number(lm, codebook):
    lm.model.lm_head.weight.data[9] = torch.nan
    with pytest.raises(NonFinite, match="step 1"):
        train_in_model(lm, batches(1), codebook)


# An encoder-decoder that knows two topics, unlearning one of them.

N_WORDS, LENGTH, N_STEPS = 16, 5, 120
SECRET, OTHER = range(4, 4 + N_WORDS), range(4 + N_WORDS, 4 + 2 * N_WORDS)
LAST = Site("resid_post", 1)


def pairs(topic, n, seed):
    """The source is a word, the target a chain of translations of it, each of the one before."""
    generator = torch.Generator().manual_seed(seed)
    word, chain = torch.randint(N_WORDS, (n, 1), generator=generator), []
    for _ in range(LENGTH):
        chain.append((5 * (chain[-1] if chain else word) + 3) % N_WORDS)
    return {"input_ids": word + topic[0], "labels": torch.cat(chain, 1) + topic[0]}


def mixed(n, seed=0):
    for i in range(n):
        one, other = pairs(SECRET, 16, seed + 2 * i), pairs(OTHER, 16, seed + 2 * i + 1)
        yield {name: torch.cat([one[name], other[name]]) for name in one}


@pytest.fixture(scope="module")
def translator():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=4 + 2 * N_WORDS, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in mixed(N_STEPS):
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    adam.zero_grad()
    return LM(model.eval(), name="t5")


@torch.no_grad()
def loss_of(lm, topic):
    batch = pairs(topic, 64, 10_001)
    return float(cross_entropy(lm.model(**batch).logits.flatten(0, 1), batch["labels"].flatten()))


def read(lm, batch):
    with torch.no_grad(), lm.read(LAST) as seen:
        lm.model(**batch)
    return seen[LAST]


def test_a_topic_of_an_encoder_decoder_is_unlearned_by_banning_its_codes(translator):
    lm = translator
    rows = torch.cat([read(lm, batch) for batch in mixed(12, seed=5000)]).flatten(0, 1)
    codebook = started(lm, LAST, rows, n_codes=128, n_active=4, init="kmeans")
    codebook = train_in_model(lm, mixed(50, seed=6000), codebook, lr=1e-3)
    fitted = []
    for topic in (SECRET, OTHER):
        x, fitter = read(lm, pairs(topic, 100, 20_000)), CorpusFitter(codebook, codebook.max_norm)
        fitter.update(x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(x.shape[1]))
        fitted.append(fitter.stats())
    stats = Stats(codebook.name, codebook.site, *fitted)
    score = EnrichmentScore()
    banned = select(stats, score, int(score(stats).isfinite().sum()))
    known = loss_of(lm, SECRET), loss_of(lm, OTHER)
    assert max(known) < 0.05
    with CodebookPatch(codebook=codebook).on(lm):
        assert max(loss_of(lm, SECRET), loss_of(lm, OTHER)) < 0.5
    for mode, error in (("refill", "drop"), ("refill", "keep"), ("zero", "drop"), ("zero", "keep"), ("prune", "drop")):
        with CodebookPatch(codebook=codebook, banned=banned, mode=mode, error=error).on(lm):
            assert loss_of(lm, SECRET) > 3
            assert loss_of(lm, OTHER) < (0.1 if error == "keep" else 0.5)
    assert (loss_of(lm, SECRET), loss_of(lm, OTHER)) == known
