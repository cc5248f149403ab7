"""From text to a trained SAE: this package against SAELens' own runner, side by side in one run.

    python benchmarks/harvest_train.py               # on the passages of the built-in concepts
    python benchmarks/harvest_train.py --train wikitext-2/test.txt --held-out wikitext-2/valid.txt --json

The same SmolLM2, site, text, architecture (BatchTopK), width, number of tokens and batch. SAELens runs
LanguageModelSAETrainingRunner on the model in memory and a dataset in memory. Both dictionaries are then measured by
the same code on the same held-out text. A third part times harvesting alone against a bare forward pass of the blocks
up to the site, no hooks, on the same batches, in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from concept_unlearn import LM, Corpus, Scope, concepts, load_dictionary
from concept_unlearn.activations import Harvest, Live
from concept_unlearn.activations.shards import cut, read
from concept_unlearn.activations.stream import _batches
from concept_unlearn.data.encode import pad
from concept_unlearn.dictionaries import BatchtopkArchitecture, Training, evaluate_dictionary, train
from concept_unlearn.recipe import held_out_texts

CONTEXT = 128
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="text to train on, as a corpus")
    parser.add_argument("--held-out", help="text to measure on")
    parser.add_argument("--layer", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--pairs", type=int, default=5, help="rounds of the harvest against the bare forward")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lm = LM.load("smollm2")
    corpus, held_out = corpora(options)
    texts = held_out_texts(lm, held_out, context=CONTEXT, tokens=10_000)
    found: dict[str, Any] = {"tokens": options.tokens, "threads": torch.get_num_threads(), "dtype": str(lm.dtype)}
    found["harvest"] = harvest_alone(lm, corpus, options)
    for name, make in (("ours", ours), ("sae_lens", sae_lens)):
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            make(lm, corpus, options, Path(scratch))
            seconds = time.perf_counter() - start
            site = f"blocks.{options.layer}.hook_resid_post"
            folder = next(Path(scratch).rglob("cfg.json")).parent
            dictionary: Any = load_dictionary(folder, site=site)
            if name == "ours":
                sink = dictionary.max_norm
            dictionary.max_norm = sink  # both measured on the same tokens
            quality = evaluate_dictionary(lm, dictionary, texts)
        found[name] = {"seconds": seconds, "tokens_per_second": options.tokens / seconds, **quality.model_dump()}
    found["speedup"] = found["sae_lens"]["seconds"] / found["ours"]["seconds"]
    show(found)
    if options.json:
        print(json.dumps(found))


def corpora(options: Any) -> tuple[Corpus, Corpus]:
    """Documents of some hundreds of words to train on, and others to measure on."""
    if options.train and options.held_out:
        paragraphs = [p for text in Corpus.load(options.train) for p in text.split("\n") if p.strip()]
        documents = ["\n".join(paragraphs[i : i + 50]) for i in range(0, len(paragraphs), 50)]
        return Corpus.of(documents), Corpus.load(options.held_out)
    scopes = [Scope.load(name) for name in concepts()]
    passages = [p.text for s in scopes for p in (*s.forget, *s.near)] + [p.text for p in scopes[0].retain]
    kept = [text for i, text in enumerate(passages) if i % 20]
    return Corpus.of(["\n".join(kept[i::200]) for i in range(200)]), Corpus.of(passages[::20])


def ours(lm: LM, corpus: Corpus, options: Any, folder: Path) -> None:
    rows = Harvest(sites=(f"resid_post.{options.layer}",), context=CONTEXT, shard_tokens=8192)
    architecture = BatchtopkArchitecture(d_sae=options.d_sae, k=32, topk_threshold_lr=0.05)
    training = Training(
        architecture=architecture, tokens=options.tokens, batch=options.batch, lr=options.lr, block_tokens=65_536
    )
    train(Live(lm, corpus, rows), training, folder, device=lm.device)


def sae_lens(lm: LM, corpus: Corpus, options: Any, folder: Path) -> None:
    from datasets import Dataset
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig
    from sae_lens.load_model import HookedProxyLM

    hook = f"model.layers.{options.layer}"
    steps = -(-options.tokens // options.batch)
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=lm.d_model, d_sae=options.d_sae, k=32, topk_threshold_lr=0.05, decoder_init_norm=0.1,
            apply_b_dec_to_input=True, normalize_activations="expected_average_only_in",
        ),
        model_name="smollm2", model_class_name="AutoModelForCausalLM", hook_name=hook, dataset_path="in memory",
        is_dataset_tokenized=False, streaming=False, context_size=CONTEXT, training_tokens=steps * options.batch,
        train_batch_size_tokens=options.batch, store_batch_size_prompts=32, n_batches_in_buffer=8,
        lr=options.lr, lr_warm_up_steps=int(0.05 * steps), lr_decay_steps=int(0.25 * steps), lr_end=options.lr / 10,
        dead_feature_window=500, exclude_special_tokens=True, n_batches_for_norm_estimate=4, device=str(lm.device),
        dtype="float32", n_checkpoints=0, checkpoint_path=None, output_path=str(folder), verbose=False, seed=0,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    dataset = Dataset.from_dict({"text": list(corpus)})
    proxy = HookedProxyLM(copy.deepcopy(lm.model), lm.tokenizer, hook_names=[hook])
    LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=proxy).run()


@torch.no_grad()
def harvest_alone(lm: LM, corpus: Corpus, options: Any) -> dict[str, float]:
    """Rows a second of one shard, and of a model that ends at the site and keeps nothing."""
    wanted = Harvest(sites=(f"resid_post.{options.layer}",), context=CONTEXT, shard_tokens=16_384)
    texts = next(cut(lm, corpus, wanted))
    bare = copy.copy(lm.model.model)
    bare._modules = dict(lm.model.model._modules)
    bare.layers = lm.model.model.layers[: options.layer + 1]
    bare.norm = torch.nn.Identity()

    def forward() -> None:
        for batch in _batches([len(t) for t in texts.ids], 4096):
            ids, mask = pad([texts.ids[i] for i in batch], side="right", device=lm.device)
            bare(input_ids=ids, attention_mask=mask.long(), use_cache=False)

    ways = {"bare": forward, "harvest": lambda: read(lm, texts, wanted)}
    for run in ways.values():
        run()
    rounds = [{name: _seconds(run) for name, run in ways.items()} for _ in range(options.pairs)]
    return {
        "rows": texts.n_rows,
        **{f"{name}_rows_per_second": texts.n_rows / statistics.median(r[name] for r in rounds) for name in ways},
        "share_of_bare": statistics.median(r["bare"] / r["harvest"] for r in rounds),
    }


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['tokens']:,} tokens of text to a trained SAE", title_justify="left")
    for column in ("", "seconds", "tokens/s", "variance explained", "L0", "never fire", "loss recovered"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("ours", "sae_lens"):
        r = found[name]
        table.add_row(
            name, f"{r['seconds']:.0f}", f"{r['tokens_per_second']:.0f}", f"{r['variance_explained']:.3f}",
            f"{r['l0']:.1f}", f"{r['dead']:.1%}", f"{r['loss_recovered']:.4f}",
        )  # fmt: skip
    console.print(table)
    h = found["harvest"]
    console.print(
        f"x{found['speedup']:.2f}; harvest alone {h['harvest_rows_per_second']:.0f} rows/s, "
        f"{h['share_of_bare']:.1%} of a bare forward to the same layer ({h['bare_rows_per_second']:.0f} rows/s)"
    )


if __name__ == "__main__":
    main()
