"""A small model beside a big one, for offset unlearning: some of its blocks, distilled on text.

python scripts/make_pair.py smollm2 runs/pair --blocks 10 --text PATH/TO/wikitext.txt --scope chess --steps 100

The small model is an ordinary Hugging Face folder with the big one's tokenizer. Embedding and head stay the big
model's own; blocks and the last norm go down KL(p_big || p_small).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div

from concept_unlearn.data.corpus import Corpus
from concept_unlearn.data.scope import Scope
from concept_unlearn.lm import LM
from concept_unlearn.lm.locate import blocks, n_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, required=True, help="how many are kept, evenly, the first and the last")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help=".txt, .jsonl or .parquet")
    parser.add_argument("--scope", nargs="*", default=[], help="scopes whose passages are read too")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    big = LM.load(options.model)
    small = keep(big, options.blocks)
    rows = pack(big, texts(options.text, options.scope), options.length)
    print(f"{n_layers(small)} of {n_layers(big.model)} blocks, {len(rows)} rows of {options.length} tokens")
    if options.steps:
        distil(big.model, small, rows, options)
    small.to(big.dtype).save_pretrained(options.folder)
    big.tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: load it with LM.load({str(options.folder)!r})")


def keep(lm: LM, n: int) -> nn.Module:
    """A copy with ``n`` of the blocks, evenly spaced; of a Llama-like model, whose blocks know their place."""
    total = n_layers(lm.model)
    chosen = sorted({round(i * (total - 1) / max(n - 1, 1)) for i in range(n)})
    small = copy.deepcopy(lm.model).float()
    kept = blocks(small)
    for place, i in enumerate(chosen):
        kept[place] = kept[i]
        kept[place].self_attn.layer_idx = place  # where its keys go in a cache
    del kept[len(chosen) :]
    small.config.num_hidden_layers = len(chosen)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[i] for i in chosen]
    return small


def texts(paths: list[Path], scopes: list[str]) -> list[str]:
    found = []
    for path in paths:
        found += list(Corpus.load(path))
    for scope in map(Scope.load, scopes):
        found += [" ".join(filter(None, (p.prompt, p.text))) for p in (*scope.forget, *scope.near, *scope.retain)] * 4
    return found


def pack(lm: LM, found: list[str], length: int) -> torch.Tensor:
    """All text in rows of equal length, one text after another."""
    ids = [token for text in found for token in (*lm.encode(text, chat=False), lm.tokenizer.eos_token_id)]
    n = len(ids) // length
    return torch.tensor(ids[: n * length]).view(n, length)


def distil(big: nn.Module, small: nn.Module, rows: torch.Tensor, options: argparse.Namespace) -> None:
    ends = {id(p) for m in (small.get_input_embeddings(), small.get_output_embeddings()) for p in m.parameters()}
    trained = [p.requires_grad_(id(p) not in ends) for p in small.parameters()]
    trained = [p for p in trained if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    generator, started = torch.Generator().manual_seed(options.seed), time.time()
    small.train()
    for step in range(1, options.steps + 1):
        ids = rows[torch.randint(len(rows), (options.batch,), generator=generator)].to(big.device)
        with torch.no_grad():
            wanted = big(input_ids=ids).logits.float().log_softmax(-1)
        said = small(input_ids=ids).logits.float().log_softmax(-1)
        loss = kl_div(said, wanted, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == 1:
            print(f"step {step}  KL {loss.item():.3f}  gradient {norm:.2f}  {time.time() - started:.0f} s", flush=True)
    small.eval()


if __name__ == "__main__":
    main()
