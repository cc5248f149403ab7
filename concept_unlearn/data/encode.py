"""Text to token ids: prompt and answer tokenised apart and joined as ids, masks made from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import InvalidConfig, InvalidData

_TEMPLATE_DATE = "01 Jan 2025"  # some templates print today's date; ours never changes from day to day
_ANCHORS = ("\n", ":", "a")
_REPLY = "moonlight"


class Padded(NamedTuple):
    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]


def has_chat_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """A chat prompt is rendered as one user turn up to where the answer begins; a plain one gets the
    tokenizer's own BOS, if it has one. Raises InvalidData for a prompt without a token.
    """
    ids = _encode_chat(tokenizer, prompt) if chat else encode_texts(tokenizer, [prompt])[0]
    if not ids:
        raise InvalidData(f"the prompt {prompt!r} has no token")
    return ids


def encode_question(tokenizer: Any, message: str, *, history: Sequence[str] = ()) -> list[int]:
    """A user's message up to where the reply begins: through the chat template, or before an empty line."""
    if has_chat_template(tokenizer):
        return _encode_chat(tokenizer, message, history)
    return encode_prompt(tokenizer, "".join(f"{turn}\n\n" for turn in (*history, message)), chat=False)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Plain texts, each with the tokenizer's own BOS, if it has one, and open at the end; an empty one has no id."""
    found = []
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        closed = ids and ids[-1] == tokenizer.eos_token_id  # T5-like tokenizers close every text
        found.append(list(ids[:-1] if closed and not text.endswith(tokenizer.eos_token or "\0") else ids))
    return found


def chat_head(tokenizer: Any) -> list[int]:
    """What every chat prompt begins with whatever the user says: the template and its default system message."""
    if not has_chat_template(tokenizer):
        return []
    return common_prefix(*(encode_prompt(tokenizer, word, chat=True) for word in ("sun", "moon")))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> list[int]:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return list(a[:n])


def encode_text(tokenizer: Any, text: str, reply_to: str | None = None) -> list[int]:
    """A passage as the model would meet it: plain, or as the reply to a user's message."""
    if reply_to is None:
        return encode_prompt(tokenizer, text, chat=False)
    return encode_question(tokenizer, reply_to) + encode_answer(tokenizer, text, after_space=False)


def encode_answer(tokenizer: Any, answer: str, *, after_space: bool) -> list[int]:
    """The ids of an answer that continues a prompt, after a space (a cloze) or not (a chat reply).

    Read off behind an anchor, because SentencePiece tokenizers put a space before any text that begins a
    string. Raises InvalidData if nothing is left.
    """
    text = f" {answer.strip()}" if after_space else answer.strip()
    if not text.strip():
        raise InvalidData(f"the answer {answer!r} has no token")
    for anchor in _ANCHORS:
        head = _plain(tokenizer, anchor)
        whole = _plain(tokenizer, anchor + text)
        if whole[: len(head)] == head and len(whole) > len(head):
            return whole[len(head) :]
    return _plain(tokenizer, text)


def end_of_answer(tokenizer: Any) -> list[int]:
    """The one token that ends a reply: the template's end of turn, or the tokenizer's EOS; none where there is none."""
    if has_chat_template(tokenizer):
        turns = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": _REPLY}]
        rendered: str = tokenizer.apply_chat_template(turns, tokenize=False, date_string=_TEMPLATE_DATE)
        tail = _plain(tokenizer, rendered.rpartition(_REPLY)[2].strip())
        if tail and _REPLY in rendered:
            return tail[:1]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pad(rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device | str = "cpu") -> Padded:
    """Padding is id 0 and is known by the mask alone, never by its id."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return Padded(ids.to(device), mask.to(device))


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_chat(tokenizer: Any, prompt: str, history: Sequence[str] = ()) -> list[int]:
    if not has_chat_template(tokenizer):
        raise InvalidConfig("this model's tokenizer has no chat template: use chat=False")
    rendered: str = tokenizer.apply_chat_template(
        [
            {"role": "assistant" if i % 2 else "user", "content": message}
            for i, message in enumerate((*history, prompt))
        ],
        tokenize=False,
        add_generation_prompt=True,
        date_string=_TEMPLATE_DATE,
    )
    return _plain(tokenizer, rendered)
