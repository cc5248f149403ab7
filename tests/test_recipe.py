"""A recipe ends in dictionaries that the rest of the package takes by their folder."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from conftest import words
from test_cli import shell

from concept_unlearn.cli import main
from concept_unlearn.config import load_config
from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.recipe import Recipe, make


@pytest.fixture
def recipe(workplace, tmp_path):
    text = [words(*(7 + (i * j) % 40 for j in range(1, 30))) for i in range(1, 80)]
    for name, lines in (("text", text[:60]), ("other", text[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    content = {
        "model": {"name": str(workplace / "model")},
        "corpus": {"source": str(tmp_path / "text.jsonl")},
        "harvest": {"sites": ["resid_post.0", "resid_post.1"], "context": 16, "shard_tokens": 300},
        "training": {"architecture": {"kind": "topk", "d_sae": 24, "k": 4}, "tokens": 6000, "batch": 100, "lr": 0.01},
        "held_out": {"source": str(tmp_path / "other.jsonl")},
        "output": str(tmp_path / "made"),
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_rows_streamed_and_rows_stored_give_dictionaries_as_good(recipe, tmp_path):
    streamed = make(load_config(Recipe, recipe))
    stored = make(load_config(Recipe, recipe, [f"store={tmp_path / 'store'}", f"output={tmp_path / 'again'}"]))
    for site, (dictionary, quality) in streamed.items():
        assert quality.variance_explained == pytest.approx(stored[site][1].variance_explained, abs=0.1)
        assert quality.variance_explained > 0.5
        assert dictionary.n_features == 24


def test_the_card_says_what_it_is(recipe, tmp_path):
    make(load_config(Recipe, recipe))
    card = (tmp_path / "made" / "blocks.1.hook_resid_post" / "README.md").read_text()
    for expected in ("kind topk, d_sae 24", ", k 4,", "variance explained", "L0 | 4.0", "recovered", "not trained on"):
        assert expected in card


def test_harvest_train_and_measure_from_the_shell(recipe, tmp_path, workplace):
    out = shell("harvest", recipe, "--store", tmp_path / "store")
    assert "rows of blocks.0.hook_resid_post, blocks.1.hook_resid_post" in " ".join(out.split())
    out = shell("train", recipe, "--set", f"store={tmp_path / 'store'}")
    assert "variance explained" in out
    folder = tmp_path / "made" / "blocks.1.hook_resid_post"
    assert load_dictionary(folder).n_features == 24
    out = shell(
        "eval-dictionary", "--dictionary", folder, "--corpus", tmp_path / "other.jsonl",
        "--model", workplace / "model", "--context", 16,
    )  # fmt: skip
    assert "4.0" in out
    common = ("--model", workplace / "model", "--scope", workplace / "scope", "--dictionary", folder)
    assert "forget tokens" in shell("rank", *common, "--score", "mean_difference", "--n", 3)


def test_a_codebook_is_made_the_same_way(recipe, tmp_path):
    spec = "training.architecture={kind: codebook, n_codes: 32, n_active: 3}"
    make(load_config(Recipe, recipe, [spec, "harvest.sites=[resid_post.1]"]))
    assert load_dictionary(tmp_path / "made" / "blocks.1.hook_resid_post").n_features == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("corpus.source=nowhere.jsonl", "no file, folder or dataset"),
        ("corpus.field=body", "no text in field 'body'"),
        ("harvest.sites=[resid_post.9]", "layers 0 to 2"),
        ("harvest.context=1", "context"),
        ("training.architecture.kind=topkk", "Did you mean 'topk'"),
        ("training.architecture.q=3", "topk architecture has no 'q'; known: d_sae"),
        ("training.batch=100000", "fewer than 100000 rows"),
        ("modell=3", "recipe has no 'modell'"),
    ],
)
def test_what_cannot_be_done_is_one_readable_line(recipe, change, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["concept-unlearn", "train", str(recipe), "--set", change])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_evaluation_while_training_needs_text_to_evaluate_on(recipe):
    with pytest.raises(InvalidConfig, match="held_out"):
        make(load_config(Recipe, recipe, ["training.evaluate_every=5", "held_out=null"]))


def test_a_full_disk_is_one_readable_line(recipe, tmp_path, monkeypatch, capsys):
    from concept_unlearn import files

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(sys, "argv", ["concept-unlearn", "harvest", str(recipe), "--store", str(tmp_path / "store")])
    with pytest.raises(SystemExit):
        main()
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("*.safetensors"))
