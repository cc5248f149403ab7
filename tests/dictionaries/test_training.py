"""Training ends in the same weights however often it is stopped, and in a dictionary that SAELens loads."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from conftest import D_MODEL
from safetensors.torch import load_file
from workers import (
    fill,
    start,
    tiny_corpus,
    tiny_harvest,
    tiny_lm,
    tiny_training,
    together,
    train_live,
    train_stored,
)

from concept_unlearn.activations import Live, Store
from concept_unlearn.dictionaries import (
    Architecture,
    BatchtopkArchitecture,
    GatedArchitecture,
    JumpreluArchitecture,
    MatryoshkaBatchtopkArchitecture,
    StandardArchitecture,
    TopkArchitecture,
    load_dictionary,
    train,
)
from concept_unlearn.dictionaries.architecture import Job
from concept_unlearn.dictionaries.sae_training import SAETrainee
from concept_unlearn.errors import EmptyData, InvalidConfig, NonFinite, UnknownName
from concept_unlearn.lm import Site

SITE = Site("resid_post", 1)
ARCHITECTURES = [
    StandardArchitecture(d_sae=24, l1_warm_up_steps=7),
    GatedArchitecture(d_sae=24),
    JumpreluArchitecture(d_sae=24, l0_warm_up_steps=5),
    TopkArchitecture(d_sae=24, k=3, dead_after=3),
    BatchtopkArchitecture(d_sae=24, k=3, dead_after=3),
    MatryoshkaBatchtopkArchitecture(d_sae=24, k=3, matryoshka_widths=(8,), dead_after=3),
]


def kind(architecture):
    return architecture.kind


def job(**changes):
    settings = {
        "site": SITE, "d_in": D_MODEL, "n_steps": 40, "batch": 32, "lr": 1e-2, "warm_up_steps": 4, "decay_steps": 10,
        "seed": 0, "device": torch.device("cpu"), "max_norm": 50.0, "model_name": "tiny", "model_fingerprint": "f",
    }  # fmt: skip
    return Job(**settings | changes)


def sparse_rows(n, seed=0):
    """Sums of three of 24 fixed directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(9)))
    chosen = torch.rand(n, 24, generator=generator).argsort(1)[:, :3]
    amounts = 1 + torch.rand(n, 3, generator=generator)
    return torch.einsum("nk,nkd->nd", amounts, directions[chosen])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_stored(store, folder)
    return folder


def weights(folder):
    return {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/sae_weights.safetensors"))}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=kind)
def test_a_restored_trainee_goes_on_bit_for_bit(architecture):
    batches = [sparse_rows(32, seed) for seed in range(12)]
    whole = architecture(job(), sparse_rows(200))
    for x in batches[:6]:
        whole.step(x)
    state = {name: t.clone() for name, t in whole.state().items()}
    other = architecture(job(), sparse_rows(200, seed=5))
    other.restore(state)
    for x in batches[6:]:
        assert whole.step(x) == other.step(x)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, other.state()[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=kind)
def test_saelens_loads_what_is_saved_and_reads_rows_as_they_come(architecture, tmp_path):
    from sae_lens import SAE

    trainee = architecture(job(), sparse_rows(200))
    for seed in range(10):
        trainee.step(sparse_rows(32, seed))
    trainee.save(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.metadata.hook_name == str(SITE)
    assert sae.cfg.normalize_activations == "none"
    x = sparse_rows(50, seed=77)
    ours = load_dictionary(tmp_path)
    torch.testing.assert_close(ours.decode(ours.encode(x), x), sae(x))
    assert ours.max_norm == 50.0
    scaled = trainee._trainer.activation_scaler(x)
    if architecture.kind in ("standard", "gated", "topk"):
        expected = trainee._sae.encode(scaled)
        torch.testing.assert_close(ours.encode(x) > 0, expected > 0)


def test_saving_in_between_changes_nothing():
    a, b = (TopkArchitecture(d_sae=24, k=3)(job(), sparse_rows(200)) for _ in range(2))
    for seed in range(6):
        a.step(sparse_rows(32, seed))
        b.step(sparse_rows(32, seed))
        a.dictionary()
    for name, tensor in a.state().items():
        assert torch.equal(tensor, b.state()[name]), name


def test_it_learns_what_the_rows_are_made_of():
    trainee = TopkArchitecture(d_sae=48, k=3)(job(n_steps=600), sparse_rows(500))
    for seed in range(600):
        trainee.step(sparse_rows(256, seed))
    x = sparse_rows(500, seed=10_000)
    dictionary = trainee.dictionary()
    missed = (x - dictionary.decode(dictionary.encode(x), x)).square().sum() / (x - x.mean(0)).square().sum()
    assert missed < 0.05


@pytest.mark.parametrize("low", [0.0, 1e9], ids=["first batch", "later batch of small values"])
@pytest.mark.parametrize("k", [3, 20], ids=lambda k: f"k {k}")
@pytest.mark.parametrize("n_dead", [0, 5, 20])
@pytest.mark.parametrize("member", [TopkArchitecture, BatchtopkArchitecture], ids=lambda m: m.kind)
def test_our_quick_topk_has_the_losses_and_gradients_of_saelens(member, n_dead, k, low):
    """Also where more may win than are positive, and whatever the last batch left behind."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    ours = member(d_sae=24, k=k)(job(), sparse_rows(200))._sae.double()
    ours.low = low
    theirs = get_sae_training_class(member.kind)[0](ours.cfg).double()
    theirs.load_state_dict(ours.state_dict())
    ours.cfg.dtype = theirs.cfg.dtype = "float64"
    ours.dtype = theirs.dtype = torch.float64
    dead = torch.arange(24) < n_dead
    found = []
    for sae in (ours, theirs):
        output = sae.training_forward_pass(TrainStepInput(sparse_rows(32).double(), {}, dead, 0, False))
        output.loss.backward()
        found.append({
            "loss": output.loss, "out": output.sae_out, "acts": output.feature_acts.to_dense(),
            **{name: p.grad for name, p in sae.named_parameters()}, **output.losses, **dict(sae.named_buffers()),
        })  # fmt: skip
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, msg=name)


def test_the_learning_rate_rises_stays_and_falls():
    trainee = TopkArchitecture(d_sae=24, k=3)(job(n_steps=20), sparse_rows(100))
    rates = []
    for seed in range(20):
        rates.append(trainee._trainer.optimizer.param_groups[0]["lr"])
        trainee.step(sparse_rows(32, seed))
    assert rates[0] < rates[2]
    assert rates[3:10] == pytest.approx([1e-2] * 7)
    assert rates[-1] < 0.2 * 1e-2


def test_killed_ten_times_it_ends_with_the_same_weights(store, trained, tmp_path):
    began = time.perf_counter()
    train_stored(store, tmp_path / "timed")
    seconds, rng = time.perf_counter() - began, random.Random(1)
    for _ in range(10):
        process = start(train_stored, store, tmp_path / "killed")
        time.sleep(rng.uniform(0.2, 0.2 + seconds / 2))
        process.kill()
        process.join()
    train_stored(store, tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(trained)
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()
    assert not (tmp_path / "killed" / "checkpoint.safetensors").exists()


def test_rows_from_the_model_resume_like_rows_from_disk(tmp_path):
    train_live(tmp_path / "whole")
    settings = tiny_training()

    def fail(step, site, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Live(tiny_lm(), tiny_corpus(), tiny_harvest()), settings, tmp_path / "stopped", log=fail)
    assert (tmp_path / "stopped" / "checkpoint.safetensors").is_file()
    train_live(tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_two_processes_train_an_equivalent_dictionary(store, trained, tmp_path):
    together(2, train_stored, store, tmp_path / "two")
    rows = torch.cat([s[SITE] for s in Store(store).shards(0, 0, 1)])

    def missed(folder):
        dictionary = load_dictionary(folder / str(SITE))
        x = rows[rows.norm(dim=-1) <= dictionary.max_norm]
        return float((x - dictionary.decode(dictionary.encode(x), x)).square().sum() / (x - x.mean(0)).square().sum())

    assert missed(tmp_path / "two") == pytest.approx(missed(trained), rel=0.1)
    with pytest.raises(InvalidConfig, match="processes is 2, asked for is 1"):
        train_stored(store, tmp_path / "two")


def test_a_finished_training_is_loaded_and_another_one_refused(store, trained):
    before = weights(trained)
    train_stored(store, trained)
    assert weights(trained) == before
    with pytest.raises(InvalidConfig, match=r"its training\.lr is 0\.0004, asked for is 0\.1"):
        train(Store(store), tiny_training(lr=0.1), trained)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    real, calls = SAETrainee.step, []

    def step(self, x):
        calls.append(1)
        return real(self, x * float("nan") if len(calls) == 25 else x)

    monkeypatch.setattr(SAETrainee, "step", step)
    with pytest.raises(NonFinite, match=r"blocks\.0\.hook_resid_post, step 13 .*shard.*the last checkpoint is kept"):
        train_stored(store, tmp_path)
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    monkeypatch.setattr(SAETrainee, "step", real)
    train_stored(store, tmp_path)


def test_evaluation_while_training_is_logged(store, tmp_path):
    train(
        Store(store), tiny_training(evaluate_every=40, tokens=64 * 60), tmp_path, evaluate=lambda d: {"n": d.n_features}
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["site"]) for r in lines if "n" in r] == [
        (step, f"blocks.{layer}.hook_resid_post") for step in (40, 60) for layer in (0, 1)
    ]
    assert {"mse_loss", "l0", "dead"} <= set(lines[-3])


def test_settings_that_cannot_be_are_refused(store, tmp_path):
    with pytest.raises(UnknownName, match="batchtopk"):
        Architecture.parse({"kind": "batch_topk", "d_sae": 4})
    with pytest.raises(InvalidConfig, match="d_sae"):
        Architecture.parse({"kind": "topk"})
    with pytest.raises(InvalidConfig, match="k 32 is more than d_sae 8"):
        train(Store(store), tiny_training(architecture=TopkArchitecture(d_sae=8)), tmp_path)
    widths = MatryoshkaBatchtopkArchitecture(d_sae=24, k=3, matryoshka_widths=(8, 30))
    with pytest.raises(InvalidConfig, match="matryoshka_widths lie between 1 and d_sae 24"):
        train(Store(store), tiny_training(architecture=widths), tmp_path / "c")
    with pytest.raises(EmptyData, match="fewer than"):
        train(Store(store), tiny_training(batch=10**6), tmp_path / "b")


def test_heads_come_flattened_and_are_saved_for_saelens_as_heads(lm, tmp_path):
    live = Live(lm, tiny_corpus(40), tiny_harvest(sites=("hook_z.1",)))
    train(live, tiny_training(tokens=640), tmp_path)
    folder = tmp_path / "blocks.1.attn.hook_z"
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    dictionary = load_dictionary(folder)
    x = next(live.shards(0, 0, 1))[Site("hook_z", 1)][:5]
    assert dictionary.decode(dictionary.encode(x), x).shape == x.shape
