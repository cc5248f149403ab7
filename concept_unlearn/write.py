"""Text that a model writes about given topics: a corpus of its own kind, which carries no licence but the model's."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from .data.corpus import Corpus
from .errors import EmptyData
from .files import write_atomically
from .lm import LM
from .tracking import Progress

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


def write(
    lm: LM,
    topics: Sequence[str],
    folder: str | Path,
    *,
    per_topic: int = 6,
    max_new_tokens: int = 192,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Every topic in ``per_topic`` of thirty formats: of a chat model two thirds as replies to a user, else all as
    continuations. One file a batch, seeded by its number, so that a call that was stopped goes on with the files that
    are missing. ``progress`` hears of texts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(lm, topics, per_topic, seed)
    for number, start in enumerate(range(0, len(jobs), batch_size)):
        batch, path = jobs[start : start + batch_size], folder / f"{number:05d}.jsonl"
        if not path.is_file():
            ids = [lm.encode(prompt, chat=chat) for prompt, chat in batch]
            written = lm.generate_ids(
                ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + number, batch_size=batch_size
            )
            texts = [lm.tokenizer.decode(a + b) for a, b in zip(ids, written, strict=True)]
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        if progress:
            progress(len(batch))
    return Corpus.load(folder)


def _jobs(lm: LM, topics: Sequence[str], per_topic: int, seed: int) -> list[tuple[str, bool]]:
    """(prompt, is it a user's message), in random order."""
    if not topics:
        raise EmptyData("no topic to write about")
    rng = random.Random(seed)
    n_chat = (2 * per_topic + 1) // 3 if lm.is_chat else 0
    found = []
    for topic in topics:
        formats = [(f, True) for f in _draw(rng, CHAT, n_chat)] + [
            (f, False) for f in _draw(rng, PLAIN, per_topic - n_chat)
        ]
        found += [(f.format(t=topic, T=topic[:1].upper() + topic[1:]), chat) for f, chat in formats]
    rng.shuffle(found)
    return found


def _draw(rng: random.Random, formats: Sequence[str], n: int) -> list[str]:
    """None twice before each has been drawn once."""
    rounds = [rng.sample(formats, len(formats)) for _ in range(-(-n // len(formats)))]
    return [f for part in rounds for f in part][:n]
