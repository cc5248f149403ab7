"""One pass of a model over what a benchmark asks: each prompt read once for all its answers, in batches of like length.

Batches are the same whatever was done before and however many processes share them, so a resumed or shared observation
is the observation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..activations.processes import Processes
from ..data.encode import encode_text, end_of_answer
from ..data.examples import Passage, Probe
from ..errors import InvalidData
from ..lm import LM, Scored
from ..lm.fingerprint import checksum
from ..lm.score import answer_batches, text_batches
from ..patches import Patch
from ..tracking import Progress
from .gradnorm import gradnorm
from .question import Question, encode_probe, encode_reply
from .records import Found, Key, Records
from .view import SCORED, Asked, Read, Reply, Seen, Tokens, View

Reads = Mapping[str, frozenset[Read]]
_SAMPLE = "In 1984, Zoë's 3 foxes weren't   there…"
_OVERLAP = 0.5
"""Of a window over a long text: what is at least seen to the left of each token that it scores."""


def observe(
    lm: LM,
    sets: Mapping[str, Asked],
    reads: Reads,
    *,
    patch: Patch | None = None,
    judge: LM | None = None,
    batch_size: int = 32,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> View:
    """Everything that ``reads`` names, each once. ``Benchmark.observe`` says more."""
    start, here = time.perf_counter(), Processes.here()
    records = Records(folder, {} if folder is None else _what(lm, patch, judge, sets, reads), here)
    judges_itself = patch is None and judge in (None, lm)
    work = _Work(lm, sets, reads, batch_size, records, here, progress, judges_itself=judges_itself)
    with patch.on(lm) if patch is not None else contextlib.nullcontext():
        work.answers()
        work.texts()
        work.replies()
        work.gradients()
    records.gather()
    if not judges_itself and any("surprise" in wanted for wanted in reads.values()):
        work.judge(judge or lm)
        records.gather()
    seen = {
        name: Seen(name, asked, tuple(records.found.get(Key(name, i), {}) for i in range(len(asked.examples))))
        for name, asked in ((name, sets[name]) for name in reads)
    }
    counts = dict(zip(work.counts, map(sum, zip(*here.gather(list(work.counts.values())), strict=True)), strict=True))
    return View(lm.name, seen, seconds=time.perf_counter() - start, seen=counts)


class _Work:
    """An observation under way."""

    def __init__(
        self, lm: LM, sets: Mapping[str, Asked], reads: Reads, batch_size: int, records: Records, here: Processes,
        progress: Progress | None, *, judges_itself: bool,
    ) -> None:  # fmt: skip
        self.lm, self.sets, self.reads, self.batch_size, self.judges_itself = lm, sets, reads, batch_size, judges_itself
        self.records, self.here, self.progress = records, here, progress
        self.counts = {"prompt_tokens": 0, "answer_tokens": 0, "written_tokens": 0}
        self._end, self._turn = end_of_answer(lm.tokenizer), -1

    def answers(self) -> None:
        """Probabilities of answers, paraphrases and distractors: all of one prompt together."""
        keys, prompts, groups, wanted = [], [], [], []
        for key, probe in self._examples(Probe, *SCORED):
            question = encode_probe(self.lm, probe)
            fields = [name for name in SCORED if name in self.reads[key.set]]
            keys.append(key)
            prompts.append(question.prompt)
            groups.append([self._answer(probe, question, t) for name in fields for t in getattr(probe, name)])
            self._check_fits(key, len(question.prompt) + max(map(len, groups[-1]), default=0) - 1)
            wanted.append(fields)
        some = [i for i, group in enumerate(groups) if group]
        batches = answer_batches(self.lm.model, [prompts[i] for i in some], [groups[i] for i in some], self.batch_size)
        nothing = [i for i, group in enumerate(groups) if not group]
        self.records.add({keys[i]: dict.fromkeys(wanted[i], ()) for i in nothing})
        n_end = len(self._end)

        def score(batch: list[int]) -> Found:
            asked = {name: "moments" in self.reads[name] for name in {keys[i].set for i in batch}}
            rows = self.lm.score(
                [prompts[i] for i in batch], [groups[i] for i in batch], batch_size=10**9, moments=any(asked.values())
            )
            found: Found = {}
            for i, row in zip(batch, rows, strict=True):
                probe, left = self._example(keys[i]), iter(row)
                assert isinstance(probe, Probe)
                end, moments = n_end if probe.chat else 0, asked[keys[i].set]
                self.counts["prompt_tokens"] += len(prompts[i])
                self.counts["answer_tokens"] += sum(map(len, groups[i]))
                found[keys[i]] = {
                    name: tuple(_tokens(next(left), end, moments and name == "answers") for _ in getattr(probe, name))
                    for name in wanted[i]
                }
            return found

        for batch in batches:
            which = [some[i] for i in batch]
            self._do({keys[i]: wanted[i] for i in which}, partial(score, which))
        self._told(len(nothing))

    def texts(self) -> None:
        """Passages, long ones by windows that overlap, each token scored once."""
        pieces: list[tuple[Key, list[int], int]] = []
        for key, passage in self._examples(Passage, "answers"):
            ids = encode_text(self.lm.tokenizer, passage.text, passage.prompt)[: self.sets[key.set].max_tokens]
            window = self.lm.context
            step = max(int(window * (1 - _OVERLAP)), 1)
            starts = [0, *range(step, max(len(ids) - window + step, step), step)]
            for start in starts:
                piece = ids[start : start + window]
                if piece[0] != ids[0] == self.lm.bos_id:  # what opens every sequence opens every window
                    piece = [ids[0], *piece[1:]]
                pieces.append((key, piece, 0 if start == 0 else window - step - 1))
        moments = {key.set: "moments" in self.reads[key.set] for key, *_ in pieces}
        by_key: dict[Key, list[int]] = {}
        for i, (key, *_) in enumerate(pieces):
            by_key.setdefault(key, []).append(i)
        keys = list(by_key)
        longest = [pieces[by_key[key][0]][1] for key in keys]

        def score(batch: list[Key]) -> Found:
            rows = [pieces[i] for key in batch for i in by_key[key]]
            texts, any_moments = [ids for _, ids, _ in rows], any(moments[key.set] for key in batch)
            scored = iter(self.lm.score_texts(texts, batch_size=self.batch_size, moments=any_moments))
            found: Found = {}
            for key, ids, skip in rows:
                part = _tokens(next(scored), 0, moments[key.set])
                self.counts["prompt_tokens"] += len(ids)
                old = found.get(key, {}).get("answers", (Tokens((), ()),))[0]
                found[key] = {"answers": (_joined(old, part, skip),)}
            return found

        for batch in text_batches(self.lm.model, longest, max(self.batch_size // 4, 1)):
            which = [keys[i] for i in batch]
            self._do(dict.fromkeys(which, ("answers",)), partial(score, which))

    def replies(self) -> None:
        """What the model writes, greedily, each set to its own length."""
        asked: dict[int, list[tuple[Key, list[int]]]] = {}
        for key, probe in self._examples(Probe, "said"):
            n, prompt = self.sets[key.set].reply_tokens(probe), encode_probe(self.lm, probe).prompt
            self._check_fits(key, len(prompt) + n)
            asked.setdefault(n, []).append((key, prompt))

        def write(batch: list[tuple[Key, list[int]]], n: int) -> Found:
            prompts = [prompt for _, prompt in batch]
            judged = {key for key, _ in batch if "surprise" in self._fields(key)}
            rows = self.lm.write(prompts, max_new_tokens=n, batch_size=len(batch), logprobs=bool(judged))
            self.counts["prompt_tokens"] += sum(map(len, prompts))
            self.counts["written_tokens"] += sum(len(row.ids) for row in rows)
            found: Found = {}
            for (key, _), row in zip(batch, rows, strict=True):
                found[key] = {"said": (reply := self._reply(key, row.ids))}
                if key in judged:
                    own = row.logprobs[: len(reply.ids)]
                    found[key]["surprise"] = -float(own.mean()) if len(own) else None
            return found

        for n, questions in sorted(asked.items()):
            questions.sort(key=lambda q: (-len(q[1]), q[0]))
            for at in range(0, len(questions), self.batch_size):
                batch = questions[at : at + self.batch_size]
                fields = {key: self._fields(key) for key, _ in batch}
                self._do(fields, partial(write, batch, n))
                self._told(sum(map(len, fields.values())) - len(fields))

    def _fields(self, key: Key) -> tuple[Read, ...]:
        """What comes of writing a reply: a model that nothing was done to judges as it writes."""
        return ("said", "surprise") if self.judges_itself and "surprise" in self.reads[key.set] else ("said",)

    def gradients(self) -> None:
        for key, example in self._examples((Probe, Passage), "gradnorm"):
            self._do({key: ("gradnorm",)}, partial(self._gradnorm, key, example))

    def judge(self, judge: LM) -> None:
        """Nats a token of each reply, to a model that is none the worse for unlearning."""
        ours, theirs = self.lm.tokenizer, judge.tokenizer
        if ours is not theirs and ours.get_vocab() != theirs.get_vocab():
            raise InvalidData(f"{judge.name} cannot judge what {self.lm.name} writes: it is of another tokenizer")
        keys, prompts, replies, silent = [], [], [], []
        for key, probe in self._examples(Probe, "surprise"):
            ids = list(self.records.found[key]["said"].ids)
            if not ids:
                silent.append(key)
                continue
            keys.append(key)
            prompts.append(encode_probe(judge, probe).prompt)
            replies.append([ids])

        def score(batch: list[int]) -> Found:
            rows = judge.score([prompts[i] for i in batch], [replies[i] for i in batch], batch_size=10**9)
            return {keys[i]: {"surprise": -float(s.logprobs.mean())} for i, (s,) in zip(batch, rows, strict=True)}

        self.records.add({key: {"surprise": None} for key in silent})
        for batch in answer_batches(judge.model, prompts, replies, self.batch_size):
            self._do({keys[i]: ("surprise",) for i in batch}, partial(score, batch))
        self._told(len(silent))

    def _do(self, fields: Mapping[Key, Sequence[str]], work: Callable[[], Found]) -> None:
        """The next batch, if it is this process's turn and it was not done before."""
        self._turn += 1
        if self._turn % self.here.world == self.here.rank and not self.records.have(fields):
            self.records.add(work())
        self._told(len(fields))

    def _told(self, n: int) -> None:
        if self.progress and n:
            self.progress(n)

    def _examples(self, kind: Any, *reads: Read) -> Iterator[tuple[Key, Any]]:
        """Those of which any of these is to be read."""
        for name, wanted in self.reads.items():
            if wanted & set(reads):
                for i, example in enumerate(self.sets[name].examples):
                    if isinstance(example, kind):
                        yield Key(name, i), example
                    elif kind is Probe and "said" in reads:
                        raise InvalidData(f"set {name!r} holds passages, which nobody can reply to")

    def _check_fits(self, key: Key, n: int) -> None:
        if n > self.lm.context:
            raise InvalidData(
                f"set {key.set!r}, example {key.at}: its prompt with what follows takes {n} tokens, and {self.lm.name} "
                f"reads {self.lm.context}"
            )

    def _example(self, key: Key) -> Probe | Passage:
        return self.sets[key.set].examples[key.at]

    def _answer(self, probe: Probe, question: Question, text: str) -> list[int]:
        ids = encode_reply(self.lm, probe, text)
        return ids + self._end if question.is_reply else ids

    def _reply(self, key: Key, ids: Sequence[int]) -> Reply:
        """Ids and text end before the first stop string."""
        stops = self.sets[key.set].stop
        text = self._decoded(ids)
        if any(stop in text for stop in stops):
            n = next(n for n in range(len(ids)) if any(stop in self._decoded(ids[: n + 1]) for stop in stops))
            ids = ids[:n]
            text = min((text.partition(stop)[0] for stop in stops), key=len)
        return Reply(tuple(ids), text.strip())

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _gradnorm(self, key: Key, example: Probe | Passage) -> Found:
        if isinstance(example, Passage):
            ids = encode_text(self.lm.tokenizer, example.text, example.prompt)[: self.sets[key.set].max_tokens]
            prompt, answer = ids[:1], ids[1:]
        else:
            question = encode_probe(self.lm, example)
            prompt, answer = question.prompt, self._answer(example, question, example.answers[0])
        return {key: {"gradnorm": gradnorm(self.lm, prompt, answer)}}


def _tokens(scored: Scored, n_end: int, moments: bool) -> Tokens:
    mean, std = ((), ()) if not moments or scored.mean is None or scored.std is None else (
        tuple(scored.mean.tolist()), tuple(scored.std.tolist())
    )  # fmt: skip
    return Tokens(tuple(scored.logprobs.tolist()), tuple(scored.greedy.tolist()), n_end, mean, std)


def _joined(old: Tokens, new: Tokens, skip: int) -> Tokens:
    """A text's tokens so far, and those of its next window that were not scored yet."""
    return Tokens(
        old.logprobs + new.logprobs[skip:], old.greedy + new.greedy[skip:], 0, old.mean + new.mean[skip:],
        old.std + new.std[skip:],
    )  # fmt: skip


def _what(lm: LM, patch: Patch | None, judge: LM | None, sets: Mapping[str, Asked], reads: Reads) -> dict[str, Any]:
    """Everything that decides what is observed."""
    asked = [[name, repr(sets[name]), sorted(wanted)] for name, wanted in sorted(reads.items())]
    tokenizer = lm.tokenizer
    split = [repr(tokenizer.chat_template), sorted(tokenizer.get_vocab().items()), lm.encode(_SAMPLE, chat=False)]
    return {
        "dtype": str(lm.dtype),  # before the weights, which change with it
        "model": [lm.fingerprint, checksum(lm.model)],
        "tokenizer": hashlib.sha256(json.dumps(split).encode()).hexdigest()[:16],
        "ends": sorted(lm.end_ids),
        "context": lm.context,
        "patch": None if patch is None else patch.digest,
        "judge": checksum((judge or lm).model),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }
