"""Let the model write about many topics in many formats: text that carries no licence but its own.

    python scripts/write_text.py scripts/topics.txt runs/corpus/written

Every topic is asked for in a few of thirty formats, two thirds through the chat template and one third as the
beginning of a plain text, sampled at temperature 1. One file a batch, each seeded by its number, so that a run
that was stopped goes on with the files that are missing.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from concept_unlearn import LM
from concept_unlearn.data.encode import pad
from concept_unlearn.files import write_atomically
from concept_unlearn.lm.forward import forward, new_cache

CHAT = (
    "Write a short encyclopedia article about {t}.",
    "Explain {t} to a ten-year-old.",
    "Explain {t} in detail for a university student.",
    "Tell me ten interesting facts about {t}.",
    "Write ten quiz questions about {t}, each followed by its answer.",
    "Write a short story that involves {t}.",
    "What is {t}? Answer in two or three sentences.",
    "Write a dialogue between a teacher and a student about {t}.",
    "Write a news report about {t}.",
    "Write five multiple-choice questions about {t} with options A to D and mark the right answer.",
    "Summarise the history of {t}.",
    "What are common misconceptions about {t}?",
    "Write a letter to a friend in which you talk about {t}.",
    "Give practical advice to somebody interested in {t}.",
    "Compare {t} with something similar.",
    "Write a blog post about {t}.",
    "List the most important people, places or terms connected with {t} and say what each is.",
    "Why is {t} important?",
    "Write a critical review or opinion about {t}.",
    "I have a question about {t}. Can you help me understand how it works?",
)
PLAIN = (
    "{T}\n\n",
    "{T} is",
    "The history of {t} begins",
    "Chapter 1: {T}\n\n",
    "Q: What should everybody know about {t}?\nA:",
    "When people talk about {t}, they usually mean",
    "Here are some facts about {t}:\n1.",
    "My grandmother once told me about {t}.",
    "Encyclopedia entry: {T}.",
    "Title: An introduction to {t}\nAbstract:",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", type=Path, help="one a line")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--per-topic", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lm = LM.load(options.model)
    batches = jobs(lm, options.topics.read_text().splitlines(), options.per_topic, options.batch_size)
    with Progress() as progress:
        for i, batch in progress.track(list(enumerate(batches)), description="write"):
            path = options.output / f"{i:05d}.jsonl"
            if not path.is_file():
                texts = [p + t for p, t in zip(batch, write(lm, batch, options.max_new_tokens, seed=i), strict=True)]
                write_atomically(path, "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())


def jobs(lm: LM, topics: list[str], per_topic: int, batch_size: int) -> list[list[str]]:
    """Prompts as text, in batches of similar length."""
    rng = random.Random(0)
    prompts = []
    for topic in topics:
        names = {"t": topic, "T": topic[:1].upper() + topic[1:]}
        chat = [lm.tokenizer.decode(lm.encode(f.format(**names), chat=True)) for f in rng.sample(CHAT, per_topic - 2)]
        prompts += chat + [f.format(**names) for f in rng.sample(PLAIN, 2)]
    rng.shuffle(prompts)
    return [sorted(prompts[i : i + batch_size], key=len) for i in range(0, len(prompts), batch_size)]


@torch.inference_mode()
def write(lm: LM, prompts: list[str], max_new_tokens: int, seed: int, temperature: float = 1.0) -> list[str]:
    """The continuation of each prompt. Leaner than ``generate``: rows that are done are dropped,
    and a token is drawn by one uniform number from the cumulated distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, mask = pad(
        [lm.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts], side="left", device=lm.device
    )
    cache: Any = new_cache(lm.model, len(prompts))
    live, written = torch.arange(len(prompts)), [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits = forward(lm.model, ids, mask, cache=cache, keep=1).logits[:, -1]
        drawn = draw(logits.float() / temperature, generator)
        for row, token in zip(live.tolist(), drawn.tolist(), strict=True):
            written[row].append(token)
        going = torch.tensor([token not in lm.end_ids for token in drawn.tolist()])
        if not going.any():
            break
        if not going.all():
            kept = going.nonzero()[:, 0].to(lm.device)
            cache.batch_select_indices(kept)
            live, drawn, mask = live[going], drawn[kept], mask[kept]
        ids, mask = drawn[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return [lm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    cumulated = logits.softmax(-1).cumsum_(-1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, uniform)[:, 0].clamp_(max=logits.shape[1] - 1)


if __name__ == "__main__":
    main()
