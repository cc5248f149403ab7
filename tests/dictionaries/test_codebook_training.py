"""Training a codebook: what each loss reaches, what a resumed run repeats, and how dead codes come back."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import D_MODEL
from workers import together

from concept_unlearn.activations.processes import Processes
from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.dictionaries.architecture import Architecture, Job
from concept_unlearn.dictionaries.codebook import Codebook
from concept_unlearn.dictionaries.codebook_training import CodebookArchitecture, code_loss, relative_error
from concept_unlearn.errors import NonFinite
from concept_unlearn.lm import Site

LOSSES = ("base", "aeloss", "vqvae", "fullaeloss")


def rows(n, seed, scale=30.0):
    """Sparse sums of directions, far from the origin and of large norm."""
    directions = torch.randn(2 * D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(n, len(directions), generator=generator)
    fires = torch.rand(n, len(directions), generator=generator) < 0.06
    return scale * (0.5 + (strength * fires) @ directions + 0.05 * torch.randn(n, D_MODEL, generator=generator))


def job(**changes):
    settings = {
        "site": Site("resid_post", 1), "d_in": D_MODEL, "n_steps": 60, "batch": 64, "lr": 3e-3, "warm_up_steps": 5,
        "decay_steps": 20, "seed": 0, "device": torch.device("cpu"), "max_norm": 1e3, "model_name": "tiny",
        "model_fingerprint": "f00",
    }  # fmt: skip
    return Job(**settings | changes)


def start(*, of=None, **settings):
    return CodebookArchitecture(**{"n_codes": 48, "n_active": 4} | settings)(of or job(), rows(600, 1))


def run(trainee, first, last):
    return [trainee.step(rows(64, 100 + i)) for i in range(first, last)]


@pytest.mark.parametrize(
    ("loss", "init"),
    [*((loss, "data") for loss in LOSSES), ("aeloss", "kmeans"), ("aeloss", "random")],
)
def test_every_loss_and_beginning_learns_to_reconstruct(loss, init):
    trainee, x = start(loss=loss, init=init), rows(500, 77)
    before = relative_error(x, trainee.dictionary()(x))
    losses = run(trainee, 0, 60)
    assert set(losses[0]) == {"loss", "reconstruction", "commitment", "usage_entropy", "codes_used"}
    after = relative_error(x, trainee.dictionary()(x))
    assert after < 0.8 * relative_error(x, x.mean(0).expand_as(x))
    assert after < before or loss != "base"  # the others pull the codes to z as well
    assert losses[0]["reconstruction"] == pytest.approx(float(before), rel=0.1)


@pytest.mark.parametrize("settings", [{"n_groups": 4}, {"distance": "euclidean"}, {"d_code": 40}, {"n_codes": 49}])
def test_every_shape_trains(settings):
    trainee, x = start(**{"n_groups": 2, **settings}), rows(500, 77)
    run(trainee, 0, 30)
    assert relative_error(x, trainee.dictionary()(x)) < 0.8 * relative_error(x, x.mean(0).expand_as(x))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_reaches_what_its_row_of_the_table_says(loss):
    x = rows(50, 3) / 30
    codebook = Codebook(site=Site("resid_post", 1), d_in=D_MODEL, sizes=(24,), n_active=2)

    def gradients(value, passed):
        return torch.autograd.grad(value, (codebook.codes, passed.z), allow_unused=True, materialize_grads=True)

    passed = codebook.bottleneck(x, codes_learn=loss != "vqvae")
    upstream = torch.randn(codebook.W_dec.shape[0], D_MODEL)
    task_codes, task_z = gradients((passed.out * (x @ upstream)).sum(), passed)
    torch.testing.assert_close(task_z, (x @ upstream) @ codebook.W_dec.T)
    assert bool(task_codes.any()) == (loss != "vqvae")
    passed = codebook.bottleneck(x)
    added_codes, added_z = gradients(code_loss(passed, loss, commitment=0.25) + 0 * passed.out.sum(), passed)
    step = 2 * (passed.z - passed.q) / len(x)
    torch.testing.assert_close(added_z, 0.25 * step if loss in ("vqvae", "fullaeloss") else torch.zeros_like(step))
    want = torch.zeros_like(codebook.codes) if loss == "base" else -codebook.encode(x).T @ step
    torch.testing.assert_close(added_codes, want)


def test_a_resumed_training_ends_in_the_same_bits():
    """Also where codes are put back from random rows, before and after the interruption."""
    whole = start(dead_after=4)
    run(whole, 0, 11)
    kept = whole.state()
    frozen = {name: value.clone() for name, value in kept.items()}
    run(whole, 11, 25)
    assert all(torch.equal(kept[name], value) for name, value in frozen.items())
    resumed = start(dead_after=4)
    run(resumed, 0, 3)
    resumed.restore(kept)
    run(resumed, 11, 25)
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    assert all(torch.equal(kept[name], value) for name, value in frozen.items())
    for name, value in whole.dictionary().state_dict().items():
        assert torch.equal(value, resumed.dictionary().state_dict()[name])


def test_the_seed_decides_everything():
    one, same, other = (start(of=job(seed=seed)) for seed in (3, 3, 4))
    for trainee in (one, same, other):
        run(trainee, 0, 5)
    assert torch.equal(one.dictionary().codes, same.dictionary().codes)
    assert not torch.equal(one.dictionary().codes, other.dictionary().codes)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_dead_codes_are_put_on_current_inputs(n_groups):
    trainee = start(dead_after=5, n_groups=n_groups, of=job(lr=1e-9))
    trainee._codebook.codes.data[::2] = -1.0  # nearest to nothing that a ReLU leaves
    used = [row["codes_used"] for row in run(trainee, 0, 12)]
    assert max(used[:5]) <= 0.5 < used[-1]
    codes = trainee._codebook.codes.detach()
    assert (codes > -1e-6).all()
    seen = trainee._codebook.hidden(torch.cat([rows(64, 100 + i) for i in range(12)]) / trainee._scale)
    for group, part in enumerate(seen.chunk(n_groups, -1)):
        mine = codes[trainee._codebook.groups == group]
        distance = torch.cdist(mine, part, compute_mode="donot_use_mm_for_euclid_dist")
        assert (distance.amin(-1) < 1e-5).sum() >= len(mine) // 2


def test_usage_is_counted():
    trainee = start(n_codes=4, n_active=4)
    losses = run(trainee, 0, 1)[0]
    assert losses["usage_entropy"] == pytest.approx(torch.tensor(4.0).log().item())
    assert losses["codes_used"] == 1.0


def test_the_learning_rate_rises_stays_and_falls_to_a_tenth():
    trainee, seen = start(of=job(n_steps=30, warm_up_steps=5, decay_steps=10, lr=1.0)), []
    for _ in range(30):
        seen.append(trainee._lr())
        trainee._n_steps += 1
    assert seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert seen[5:19] == [1.0] * 14
    assert seen[-1] == pytest.approx(0.1)
    assert all(b < a for a, b in itertools.pairwise(seen[19:]))


def test_a_loss_that_is_no_number_stops_before_any_weight_is_touched():
    trainee = start()
    before = trainee.state()
    with pytest.raises(NonFinite, match=r"the loss is .*nan"):
        trainee.step(torch.full((4, D_MODEL), torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in trainee.state().items())


def test_what_is_saved_is_what_was_trained(tmp_path):
    trainee = start()
    run(trainee, 0, 3)
    trainee.save(tmp_path / "codes")
    found = load_dictionary(tmp_path / "codes")
    x = rows(20, 5)
    assert torch.equal(found(x), trainee.dictionary()(x))
    assert (found.model_name, found.model_fingerprint, found.max_norm) == ("tiny", "f00", 1e3)
    run(trainee, 3, 5)
    assert not torch.equal(found(x), trainee.dictionary()(x))


def test_it_is_an_architecture_by_name():
    assert Architecture.parse({"kind": "codebook", "n_codes": 10}) == CodebookArchitecture(n_codes=10)


def test_fewer_rows_than_codes_leave_the_rest_random():
    trainee = CodebookArchitecture(n_codes=24, n_active=2)(job(), rows(10, 1))
    assert relative_error(rows(9, 1), trainee.dictionary()(rows(9, 1))).isfinite()


def half(folder):
    """One process of two, with every other row of each batch."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    PartialState(cpu=True)
    rank = Processes.here().rank
    trainee = start(dead_after=4)
    losses = [trainee.step(rows(64, 100 + i)[rank::2]) for i in range(10)]
    torch.save({"state": trainee.state(), "losses": losses}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_with_half_a_batch_each_do_what_one_does(tmp_path):
    together(2, half, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert first["losses"] == second["losses"]
    alone = start(dead_after=4)
    for found, want in zip(first["losses"], run(alone, 0, 4), strict=False):
        assert found == pytest.approx(want, rel=1e-3)
