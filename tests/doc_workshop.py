"""Where the pages' code is run: a tiny model by the name of the embedded one, with its own dictionaries and concepts.

Names, files, sites and settings are those that a page shows, and everything behind them takes milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import EOS, make_perfect_sae, make_tokenizer, words

from concept_unlearn.data.scope import Scope
from concept_unlearn.lm import LM
from concept_unlearn.lm.embedded import EMBEDDED

D_MODEL, N_LAYERS, VOCAB = 128, 10, 128
CONCEPT, NEAR, FAR = range(88, 112), range(64, 88), range(16, 64)
N_PLANTED = 96
"""Dimensions of the stream that are negative on every word but the concept's, on each of which half are large."""
SITES = (5, 7, 9)
AUTHORS = 4


def make_tiny() -> Any:
    """Narrower than the embedded model, and with the layers that the shipped dictionaries are of."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.05)
        embedding = model.model.embed_tokens.weight
        embedding[:, :N_PLANTED] = -embedding[:, :N_PLANTED].abs()
        rows = embedding[CONCEPT.start : CONCEPT.stop, :N_PLANTED]
        rows[torch.rand(rows.shape) < 0.5] *= -2
    model.generation_config.eos_token_id = EOS
    return model.eval()


def build(root: Path) -> None:
    """Cache, dictionaries and concepts, and what readers bring: a scope of their own, text, questions and answers."""
    model, tokenizer = make_tiny(), make_tokenizer(VOCAB)
    folder = root / "cache" / EMBEDDED["smollm2"].folder.name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for layer in SITES:
        site = f"blocks.{layer}.hook_resid_post"
        make_perfect_sae(site, d_in=D_MODEL).save_model(root / "dictionaries" / "smollm2" / site)
        (root / "dictionaries" / "smollm2" / site / "README.md").write_text("Of a tiny model.\n")
    lm = LM(model, tokenizer)
    sets = _scope(lm, torch.Generator().manual_seed(0))
    for concept in ("astronomy", "chess", "france", "harry_potter", "photosynthesis", "shakespeare"):
        _write(root / "concepts" / concept, {k: v for k, v in sets.items() if k not in ("retain", "out_far")})
    _write(root / "concepts" / "_shared", {k: sets[k] for k in ("retain", "out_far")})


def bring(root: Path, home: Path) -> None:
    """What a reader has in his own folder before he begins."""
    lm = LM.load("smollm2")
    generator = torch.Generator().manual_seed(1)
    _write(home / "my_concept", _scope(lm, generator))
    for name in ("text", "other_text"):
        (home / name).mkdir()
        (home / name / "a.txt").write_text("\n\n".join(_draw(range(16, 112), 60, generator, 400)))
    _write(home / "tofu", _tofu(lm, generator))
    (home / "topics.txt").write_text("\n".join(_draw(FAR, 2, generator, 3)) + "\n")
    for name in ("configs", "scripts", "benchmarks", "notebooks"):
        (home / name).symlink_to(Path(__file__).parents[1] / name)


def _scope(lm: LM, generator: torch.Generator) -> dict[str, list[dict[str, Any]]]:
    def texts(pool: range, n: int) -> list[dict[str, Any]]:
        return [
            {"text": text, "attributes": {"author": f"author {i % AUTHORS}"}}
            for i, text in enumerate(_draw(pool, n, generator))
        ]

    sets = {
        "forget": texts(CONCEPT, 24), "near": texts(NEAR, 12), "retain": texts(FAR, 24),
        "in_easy": _known(lm, CONCEPT, 16, generator), "in_hard": _known(lm, CONCEPT, 12, generator),
        "out_near": _known(lm, NEAR, 16, generator), "out_far": _known(lm, FAR, 16, generator),
    }  # fmt: skip
    Scope.of("checked", **sets)
    return sets


def _tofu(lm: LM, generator: torch.Generator) -> dict[str, list[dict[str, Any]]]:
    def rows(pool: range, n: int) -> list[dict[str, Any]]:
        names = ("question", "answer", "paraphrased_question", "paraphrased_answer", "1", "2")
        columns = {name: _draw(pool, n, generator, 6) for name in names}
        columns["answer"] = lm.generate(columns["question"], max_new_tokens=3)
        wrong = zip(columns.pop("1"), columns.pop("2"), strict=True)
        columns["perturbed_answer"] = [list(pair) for pair in wrong]  # type: ignore[misc]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return {
        "forget01_perturbed": rows(CONCEPT, 6), "retain_perturbed": rows(NEAR, 6),
        "real_authors_perturbed": rows(range(16, 40), 4), "world_facts_perturbed": rows(range(40, 64), 4),
    }  # fmt: skip


def _draw(pool: range, n: int, generator: torch.Generator, length: int = 12) -> list[str]:
    ids = torch.randint(len(pool), (n, length), generator=generator)
    return [words(*(pool[i] for i in row.tolist())) for row in ids]


def _known(lm: LM, pool: range, n: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Questions that the model answers, because the answers are what it says."""
    prompts = _draw(pool, n, generator, 6)
    said = lm.generate(prompts, max_new_tokens=1)
    found = [
        {"prompt": p, "answers": [s], "distractors": ["w7", "w8", "w9"]} for p, s in zip(prompts, said, strict=True)
    ]
    return [f for f in found if f["answers"][0] not in ("", "w7", "w8", "w9")]


def _write(folder: Path, sets: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
