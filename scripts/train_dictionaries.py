"""Train the shipped dictionaries: harvest the model's activations once, then train one SAE a site on them.

    python scripts/public_text.py runs/corpus/public.jsonl
    python scripts/write_text.py scripts/topics.txt runs/corpus/written
    python scripts/train_dictionaries.py runs/corpus/public.jsonl runs/corpus/written/*.jsonl \
        --sites resid_post.5 resid_post.7 resid_post.9 --tokens 8000000 --held-out ../shared/data/wikitext-2/test.txt

SAELens' own trainer (BatchTopK, saved as JumpReLU), fed with rows in random order. BOS and sinks, tokens above
five median norms, are left out. A harvest that was stopped goes on where it was, and a trained site is not trained
again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import nn

from concept_unlearn import LM, SAEDictionary, Site
from concept_unlearn.activations import Rows, stream

SINK = 5.0
CONTEXT = 256
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text", nargs="+", type=Path, help="JSON Lines files with a text field; a file may be named twice"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--harvest-tokens", type=int, default=6_000_000)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="to train each site on")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument(
        "--dead-window", type=int, default=150, help="steps without firing after which a feature is dead"
    )
    parser.add_argument("--about", default="", help="where the text is from, for the model card")
    parser.add_argument("--held-out", type=Path, help="plain text never trained on")
    parser.add_argument("--held-out-tokens", type=int, default=60_000)
    parser.add_argument("--work", type=Path, default=Path("runs/dictionaries"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lm = LM.load(options.model)
    sites = [Site.parse(name) for name in options.sites]
    harvest(lm, sites, options)
    for site in sites:
        folder = options.work / "trained" / str(site)
        if not (folder / "cfg.json").is_file():
            train(lm, site, folder, options)
        if options.held_out:
            (folder / "README.md").write_text(card(lm, site, folder, evaluate(lm, folder, options), options))
            console.print(Markdown((folder / "README.md").read_text()))


def harvest(lm: LM, sites: list[Site], options: Any) -> None:
    """Rows in float16, one file a site, and how many of them there are."""
    state_path = options.work / "harvest.json"
    state = json.loads(state_path.read_text()) if state_path.is_file() else {"rows": 0, "chunks": 0}
    if state["rows"] >= options.harvest_tokens or state.get("finished"):
        return
    documents = [json.loads(line)["text"] for path in options.text for line in path.open()]
    random.Random(options.seed).shuffle(documents)
    chunk = 256
    with Progress(console=console) as progress:
        task = progress.add_task("harvest", total=options.harvest_tokens, completed=state["rows"])
        for start in range(state["chunks"] * chunk, len(documents), chunk):
            texts = [
                lm.tokenizer(d, add_special_tokens=False)["input_ids"][:CONTEXT]
                for d in documents[start : start + chunk]
            ]
            held: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
            texts = [t for t in texts if len(t) > 1]
            for rows in stream(lm, sites, texts):
                rows = without_head(lm, rows, texts)
                norms = {site: x.float().norm(dim=-1) for site, x in rows.activations.items()}
                state.setdefault("max_norm", {str(s): SINK * float(n.median()) for s, n in norms.items()})
                for site, x in rows.activations.items():
                    held[site].append(x[norms[site] <= state["max_norm"][str(site)]].half().cpu())
            kept = {site: torch.cat(parts) for site, parts in held.items()}
            for site, x in kept.items():
                with (options.work / f"{site}.f16").open("r+b" if state["chunks"] else "wb") as file:
                    file.seek(state.get("bytes", {}).get(str(site), 0))
                    file.write(x.numpy().tobytes())
            state["bytes"] = {str(s): state.get("bytes", {}).get(str(s), 0) + x.numel() * 2 for s, x in kept.items()}
            state["rows"] = min(state["bytes"].values()) // 2 // lm.d_model
            state["chunks"] += 1
            state_path.write_text(json.dumps(state))
            progress.update(task, completed=state["rows"])
            if state["rows"] >= options.harvest_tokens:
                break
    state_path.write_text(json.dumps(state | {"finished": True}))


def without_head(lm: LM, rows: Rows, texts: list[list[int]]) -> Rows:
    """Without the tokens that every chat begins with: their activations are the same each time."""
    head = lm.chat_head
    n_head = sum(token != lm.bos_id for token in head)
    owners, counts = rows.sequence.unique_consecutive(return_counts=True)
    position = torch.cat([torch.arange(n) for n in counts.tolist()])
    is_chat = torch.tensor([texts[i][: len(head)] == head for i in owners.tolist()]).repeat_interleave(counts.cpu())
    keep = (~is_chat | (position >= n_head)).to(rows.sequence.device)
    return Rows({site: x[keep] for site, x in rows.activations.items()}, rows.sequence[keep])


def batches(path: Path, d: int, n_rows: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Every row once an epoch, in an order of its own."""
    rows = np.memmap(path, dtype=np.float16, mode="r").reshape(-1, d)
    for epoch in range(10**6):
        order = np.random.default_rng((seed, epoch)).permutation(min(n_rows, len(rows)))
        for start in range(0, len(order) - batch + 1, batch):
            yield torch.from_numpy(rows[np.sort(order[start : start + batch])].astype(np.float32))


class TopOfBatch(nn.Module):
    """SAELens' BatchTopK without its sort of everything: the last batch's threshold leaves few candidates."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k, self.low = k, 0.0

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        n = int(self.k * len(pre))
        with torch.no_grad():
            candidates = pre[pre > self.low]
            if len(candidates) < n:
                candidates = pre.flatten().relu()
            cut = float(candidates.topk(n, sorted=False).values.min())
            self.low = 0.8 * cut
        return torch.where((pre >= cut) & (pre > 0), pre, 0.0)


class QuickBatchTopK(BatchTopKTrainingSAE):
    """SAELens' BatchTopK, the same losses to rounding, for fewer operations."""

    def get_activation_fn(self) -> TopOfBatch:
        return TopOfBatch(self.cfg.k)

    def calculate_topk_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of the dead columns alone."""
        dead = torch.tensor([]) if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
        if not len(dead):
            return sae_out.new_tensor(0.0)
        k_aux = self.cfg.d_in // 2
        pre, decoder = hidden_pre[:, dead], self.W_dec[dead]
        if len(dead) > k_aux:
            top = pre.topk(k_aux, sorted=False)
            pre = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        found = (pre / decoder.norm(dim=-1)) @ decoder
        missed = (sae_in - sae_out).detach()
        return self.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1.0) * (found - missed).pow(2).sum(-1).mean()


def train(lm: LM, site: Site, folder: Path, options: Any) -> None:
    state = json.loads((options.work / "harvest.json").read_text())
    torch.manual_seed(options.seed)
    sae = QuickBatchTopK(
        BatchTopKTrainingSAEConfig(
            d_in=lm.d_model, d_sae=options.d_sae, k=options.k, dtype="float32", device=str(lm.device),
            normalize_activations="expected_average_only_in", apply_b_dec_to_input=True, decoder_init_norm=0.1,
        )
    )  # fmt: skip
    provider = batches(options.work / f"{site}.f16", lm.d_model, state["rows"], options.batch, options.seed)
    n_steps = math.ceil(options.tokens / options.batch)
    config = SAETrainerConfig(
        total_training_samples=n_steps * options.batch, train_batch_size_samples=options.batch, lr=options.lr,
        lr_end=options.lr / 10, lr_scheduler_name="constant", lr_warm_up_steps=min(200, n_steps // 10),
        lr_decay_steps=n_steps // 4, dead_feature_window=options.dead_window, feature_sampling_window=500,
        n_batches_for_norm_estimate=20, device=str(lm.device), logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae = SAETrainer(config, sae, provider).fit()
    sae.cfg.metadata.model_name = lm.name
    sae.cfg.metadata.model_fingerprint = lm.fingerprint
    sae.cfg.metadata.hook_name = str(site)
    sae.cfg.metadata.max_norm = state["max_norm"][str(site)]
    sae.cfg.metadata.training_tokens = n_steps * options.batch
    sae.cfg.metadata.harvested_tokens = state["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    sae.save_inference_model(str(folder))
    weights = folder / "sae_weights.safetensors"
    save_file({name: t.half().contiguous() for name, t in load_file(weights).items()}, weights)


@torch.no_grad()
def evaluate(lm: LM, folder: Path, options: Any) -> dict[str, float]:
    """On text never trained on: variance explained, L0, share of features that never fire, loss recovered."""
    from concept_unlearn import load_dictionary

    dictionary = load_dictionary(folder)
    ids = lm.tokenizer(options.held_out.read_text(), add_special_tokens=False)["input_ids"][: options.held_out_tokens]
    texts = [ids[i : i + CONTEXT] for i in range(0, len(ids), CONTEXT)]
    count, l0, n = torch.zeros(dictionary.n_features), 0.0, 0
    parts, residual = [], 0.0
    for rows in stream(lm, [dictionary.site], texts):
        x = rows.activations[dictionary.site].float()
        x = x[x.norm(dim=-1) <= dictionary.max_norm]
        acts = dictionary.encode(x)
        residual += float((x - dictionary.decode(acts, x)).square().sum())
        parts.append(torch.stack([x.sum(0), x.square().sum(0)]))
        count += (acts > 0).float().sum(0)
        l0, n = l0 + float((acts > 0).sum()), n + len(x)
    total, squares = torch.stack(parts).sum(0)
    losses = [loss(lm, texts[:40], dictionary, how) for how in ("model", "spliced", "zero")]
    return {
        "variance_explained": 1 - residual / float((squares - total.square() / n).sum()),
        "l0": l0 / n,
        "dead": float((count == 0).float().mean()),
        "loss": losses[0],
        "loss_spliced": losses[1],
        "loss_recovered": (losses[2] - losses[1]) / (losses[2] - losses[0]),
        "held_out_tokens": n,
    }


def card(lm: LM, site: Site, folder: Path, found: dict[str, float], options: Any) -> str:
    """The model card, in Markdown."""
    config = json.loads((folder / "cfg.json").read_text())
    rows = {
        "model": f"{lm.name} (fingerprint {lm.fingerprint})",
        "site": str(site),
        "architecture": f"{config['architecture']}: SAELens' BatchTopK (k {options.k:g}), in float16",
        "features": f"{config['d_sae']:,}",
        "trained on": f"{config['metadata']['training_tokens']:,} tokens, "
        f"drawn from {config['metadata']['harvested_tokens']:,} harvested",
        "left out": f"BOS, what every chat begins with, sinks (norm above {config['metadata']['max_norm']:.0f})",
        "variance explained": f"{found['variance_explained']:.3f}",
        "L0": f"{found['l0']:.1f}",
        "features that never fire": f"{found['dead']:.1%}",
        "loss recovered when spliced in": f"{found['loss_recovered']:.4f} "
        f"({found['loss']:.3f} nats a token, {found['loss_spliced']:.3f} spliced)",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return (
        f"# {site} of {lm.name}\n\n{options.about}\n\n| | |\n|---|---|\n{table}\n"
        f"The last four were measured on {found['held_out_tokens']:,.0f} tokens of {options.held_out.name} "
        f"({options.held_out.parent.name}), never trained on.\n"
    )


def loss(lm: LM, texts: list[list[int]], dictionary: SAEDictionary, how: str) -> float:
    """Nats a token with the site left alone, replaced by its reconstruction (sinks kept), or by zero."""

    def replace(x: torch.Tensor, _: Any) -> torch.Tensor:
        if how == "model":
            return x
        kept = x.float().norm(dim=-1, keepdim=True) > dictionary.max_norm
        y = (
            torch.zeros_like(x)
            if how == "zero"
            else dictionary.decode(dictionary.encode(x.float()), x.float()).to(x.dtype)
        )
        return torch.where(kept, x, y)

    with lm.edit({dictionary.site: replace}):
        scored = lm.score_texts(texts)
    return -float(sum(s.logprobs.sum() for s in scored)) / sum(len(s.logprobs) for s in scored)


if __name__ == "__main__":
    main()
