"""What every method leaves behind, held to one contract: a patch that can be taken off, saved, stacked and trusted."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

import pytest
import torch
from conftest import make_hf, make_tokenizer, n_hooks

from concept_unlearn.errors import PatchMismatch
from concept_unlearn.lm import LM
from concept_unlearn.methods import Method
from concept_unlearn.patches import Patch, Stack, load_patch

pytestmark = pytest.mark.filterwarnings(
    "ignore:the probe gate flags .* of .* prompts", "ignore:on held-out text to .* the student is"
)

DESCENT = {"lr": 1e-2, "max_steps": 2, "batch_size": 4, "micro_batch": 4}
FINETUNE = {"kind": "finetune", "objectives": ["npo", "retain_nll"], **DESCENT}
SUPPRESS = {"kind": "suppress", "dictionaries": ["SECOND"], "n": 2, "score": "mean_difference", "edit": "dense_clamp"}
ROWS: dict[str, dict[str, Any]] = {
    "suppress": SUPPRESS,
    "steer": {"kind": "steer", "sites": ["resid_post.1"], "gate": {"kind": "probe", "alpha": 0.2}},
    "ban": {"kind": "ban", "codebook": "CODEBOOK", "n": 3},
    "finetune": FINETUNE,
    "finetune, masked": FINETUNE | {"mask": {"score": "wagle", "ratio": 0.5}},
    "finetune, adapter": FINETUNE | {"adapter": {"r": 2, "target_modules": ["up_proj"]}},
    "negate": {"kind": "negate", **DESCENT},
    "split_merge": {"kind": "split_merge", "clusters": 2, "method": FINETUNE},
    "crisp": {"kind": "crisp", "dictionaries": ["SECOND"], "n": 2, "score": "mean_difference", **DESCENT},
    "distil": {"kind": "distil", "teacher": SUPPRESS, **DESCENT},
    "eul": {"kind": "eul", "layers": [0, 1], "width": 3, "alternate": False, **DESCENT},
    "expert": {"kind": "expert", "layers": [1], "width": 4, "sticky": True, **DESCENT},
    "offset": {"kind": "offset", "small": "SMALL", **DESCENT},
    "corrupt": {"kind": "corrupt", "start": 2.0, "max_steps": 0},
    "prefix": {"kind": "prefix", "prefixes": ["w40 w41", "w42"], "batch_size": 2, "budget": 60},
    "black_box": {"kind": "black_box", "budget": 60, "q": 2, "k": "all", "lr": 1.0},
}
"""A spec of every method there is, by its name; where several are worth it, with a word behind it."""


def test_every_method_has_a_row():
    assert {spec["kind"] for spec in ROWS.values()} == set(Method.members)


@pytest.fixture(scope="module")
def folders(planted, codes, tmp_path_factory):
    """What some methods work with, by the word that stands for it."""
    root = tmp_path_factory.mktemp("contracts")
    make_hf("gpt2", seed=3).save_pretrained(root / "small")
    make_tokenizer().save_pretrained(root / "small")
    return {"SECOND": planted.second, "CODEBOOK": codes, "SMALL": str(root / "small")}


@pytest.fixture(scope="module")
def made(planted, folders):
    """The patch of a row, made once."""

    @cache
    def make(name: str) -> Patch:
        before = state(planted.lm)
        patch = method(name, folders)(planted.lm, planted.scope)
        assert state(planted.lm) == before, "fitting left something behind"
        return patch.met(planted.lm, [p.text for p in planted.scope.forget[:3]])

    return make


def method(name: str, folders: dict[str, str]) -> Method:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        return folders.get(value, value) if isinstance(value, str) else value

    return Method.parse(named(ROWS[name]))


def state(lm: LM) -> tuple[Any, ...]:
    """Every bit of the model, and everything that hangs on it."""
    weights = hashlib.sha256()
    for _, p in sorted(lm.model.state_dict().items()):
        weights.update(p.contiguous().view(torch.uint8).numpy().data)
    flags = tuple((p.requires_grad, p.grad is None, p.data_ptr()) for p in lm.model.parameters())
    modes = tuple(m.training for m in lm.model.modules())
    return weights.hexdigest(), flags, modes, n_hooks(lm.model), sorted(vars(lm.model))


@torch.no_grad()
def logits(lm: LM, rows: list[list[int]]) -> list[torch.Tensor]:
    return [lm.logits(torch.tensor([row]))[0] for row in rows]


@pytest.fixture(scope="module")
def rows(planted):
    """Prompts of what is to be forgotten and of what is kept, of different lengths."""
    lm = planted.lm
    texts = [p.text for p in (*planted.scope.forget[:3], *planted.scope.retain[:3])]
    return [lm.encode(text, chat=False)[: 4 + i % 3 * 2] for i, text in enumerate(texts)]


every_method = pytest.mark.parametrize("name", list(ROWS))


@every_method
def test_on_it_changes_the_model_and_off_not_a_bit(planted, made, rows, name):
    lm, patch, before = planted.lm, made(name), state(planted.lm)
    plain = logits(lm, rows)
    with patch.on(lm) as switch:
        changed = logits(lm, rows)
        switch.enabled = False
        off = logits(lm, rows)
        switch.enabled = True
        again = logits(lm, rows)
    with patch.at(0.0).on(lm):
        zero = logits(lm, rows)
    assert any(not torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
    for same in (off, zero, logits(lm, rows)):
        assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, changed, strict=True))
    assert state(lm) == before


@every_method
def test_nothing_is_left_of_it_after_an_error(planted, made, rows, name):
    lm, before = planted.lm, state(planted.lm)
    with pytest.raises(ZeroDivisionError), made(name).on(lm):
        lm.logits(torch.tensor([rows[0]])) / (1 // 0)
    assert state(lm) == before


@every_method
def test_it_does_the_same_with_and_without_the_cache_alone_and_padded(planted, made, rows, name):
    lm = planted.lm
    with made(name).on(lm):
        together = lm.generate_ids(rows, max_new_tokens=6)
        assert lm.generate_ids(rows, max_new_tokens=6, use_cache=False) == together
        assert lm.generate_ids(rows, max_new_tokens=6, batch_size=1) == together
        asked = [[[9, 10, 11], [12]] for _ in rows]
        whole, alone = lm.score(rows, asked), lm.score(rows, asked, batch_size=1)
    for a, b in zip(whole, alone, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.logprobs, y.logprobs, rtol=1e-4, atol=1e-4)


@every_method
def test_saved_and_loaded_it_is_the_same_and_refuses_another_model(planted, made, folders, rows, name, tmp_path):
    lm, patch = planted.lm, made(name)
    made_by = method(name, folders)
    patch.save(tmp_path / "patch", made=made_by.record(patch))
    record = json.loads((tmp_path / "patch" / "config.json").read_text())["made"]
    assert (record["method"], record["access"]) == (json.loads(json.dumps(made_by.spec())), patch.access)
    again = load_patch(tmp_path / "patch", lm)
    assert (again.spec(), again.digest) == (patch.spec(), patch.digest)
    with patch.on(lm):
        want = logits(lm, rows)
    with again.on(lm):
        assert all(torch.equal(a, b) for a, b in zip(logits(lm, rows), want, strict=True))
    with pytest.raises(PatchMismatch):
        load_patch(tmp_path / "patch", LM(make_hf(seed=7), make_tokenizer(), name="another"))


@every_method
def test_stacked_with_another_it_comes_off_last_in_first_out(planted, made, rows, name, tmp_path):
    lm, patch, below, before = planted.lm, made(name), made("finetune"), state(planted.lm)
    with below.on(lm):
        want = logits(lm, rows)
        with patch.on(lm):
            both = logits(lm, rows)
        assert all(torch.equal(a, b) for a, b in zip(logits(lm, rows), want, strict=True))
    Stack((below, patch)).met(lm, [p.text for p in planted.scope.forget[:2]]).save(tmp_path / "stack")
    with load_patch(tmp_path / "stack", lm).on(lm):
        assert all(torch.equal(a, b) for a, b in zip(logits(lm, rows), both, strict=True))
    assert state(lm) == before


@every_method
def test_made_again_it_is_the_same_to_the_last_bit(planted, made, folders, name):
    assert method(name, folders)(planted.lm, planted.scope).digest == made(name).digest


@every_method
def test_its_spec_says_all_of_it(folders, name):
    one = method(name, folders)
    assert Method.parse(one.spec()) == one
