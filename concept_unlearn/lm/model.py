"""A live model and its tokenizer: read, edited, asked and scored at named sites, never copied or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..data.encode import chat_head, encode_answer, encode_prompt, has_chat_template
from ..errors import InvalidData, NonFinite
from ..tracking import Progress
from . import hooks
from .fingerprint import fingerprint
from .forward import forward, run_until_stopped
from .generate import Written, write
from .hooks import EditFn, LogitsFn
from .insert import ChosenFn, inserting
from .load import load
from .locate import is_hooked, locate, n_layers, root, text_config
from .score import Scored, score_answers, score_texts
from .site import Site


class LM:
    """``LM(model, tokenizer)`` around a live Hugging Face model, HookedTransformer or TransformerBridge.

    A TransformerLens model brings its own tokenizer. The model is put in eval mode by nobody: it is used as given.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, name: str | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self.name = name or _name(model)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> LM:
        """``"smollm2"`` (the embedded default), a Hub id, a folder or a ``.gguf`` file, in eval mode.

        ``dtype="auto"`` is the checkpoint's, except that a CPU without bfloat16 or float16 arithmetic gets
        float32, which holds the same values and runs faster. Raises ModelNotFound.
        """
        model, tokenizer, known_as = load(
            name, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer, name=known_as)

    # What it is.

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise InvalidData("this LM was made without a tokenizer: LM(model, tokenizer)")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def n_layers(self) -> int:
        return n_layers(self.model)

    @property
    def d_model(self) -> int:
        config: Any = self.model.cfg if is_hooked(self.model) else text_config(self.model)
        return int(config.d_model if is_hooked(self.model) else config.hidden_size)

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have."""
        if is_hooked(self.model):
            return int(self.model.cfg.n_ctx)  # type: ignore[union-attr, arg-type]
        return int(getattr(text_config(self.model), "max_position_embeddings", None) or 10**9)

    @property
    def is_chat(self) -> bool:
        return has_chat_template(self.tokenizer)

    @property
    def bos_id(self) -> int | None:
        """The token that opens every sequence and is never edited, measured or trained on."""
        config: Any = getattr(root(self.model), "config", None)
        found = getattr(self._tokenizer, "bos_token_id", None) if self._tokenizer is not None else None
        return found if found is not None else getattr(config, "bos_token_id", None)

    @cached_property
    def chat_head(self) -> list[int]:
        """What every chat prompt begins with: it says nothing of the user's message, so prompt gates skip it."""
        return [] if self._tokenizer is None else chat_head(self._tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        config: Any = getattr(self.model, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
        found = self.tokenizer.eos_token_id if found is None else found
        return list(found) if isinstance(found, list) else [] if found is None else [found]

    # Hooks.

    def edit(self, edits: Mapping[Site, EditFn]) -> AbstractContextManager[None]:
        """Forward passes inside the block run with the activations at these sites edited."""
        return hooks.editing(self.model, edits, self.bos_id, self.chat_head)

    def edit_logits(self, fn: LogitsFn) -> AbstractContextManager[None]:
        """Forward passes inside the block say what ``fn(logits, context, kept)`` makes of their logits."""
        return hooks.editing_logits(self.model, fn, self.bos_id, self.chat_head)

    def insert(self, tokens: Sequence[int], chosen: ChosenFn) -> AbstractContextManager[None]:
        """Prompts inside the block that are chosen are read with these tokens before their text."""
        return inserting(self.model, tokens, chosen, self.bos_id, self.chat_head)

    def read(self, *sites: Site) -> AbstractContextManager[dict[Site, Float[Tensor, "batch seq d"]]]:
        """The block's dict holds the last activation seen at each site."""
        return hooks.reading(self.model, sites)

    def stop_at(self, site: Site) -> AbstractContextManager[None]:
        """Forward passes inside the block raise ``hooks.Stopped`` right after this site; ``activations`` catches it."""
        return hooks.stopping(self.model, site)

    def locate(self, site: Site) -> nn.Module:
        return locate(self.model, site).module

    @contextmanager
    def swap(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the named parameters are these tensors; nothing is copied, so leaving is exact."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = {name: parameters[name].data for name in weights}
        try:
            for name, value in weights.items():
                parameters[name].data = value
            yield
        finally:
            for name, value in own.items():
                parameters[name].data = value

    # Passes.

    def logits(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        return forward(self.model, ids, mask).logits

    @torch.no_grad()
    def activations(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], *sites: Site
    ) -> dict[Site, Float[Tensor, "batch seq d"]]:
        """One pass that goes no deeper than the deepest site. Raises NonFinite, which names the site."""
        with ExitStack() as stack:
            seen = stack.enter_context(self.read(*sites))
            stack.enter_context(self.stop_at(max(sites)))
            run_until_stopped(self.model, ids, mask)
        for site, x in seen.items():
            seen[site] = x = x.flatten(2)
            if not x[mask].isfinite().all():
                raise NonFinite(f"{self.name} computes NaN or infinite activations at {site}")
        return seen

    # Text.

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, chat=chat)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        chat: bool | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        use_cache: bool = True,
        progress: Progress | None = None,
    ) -> list[str]:
        """One continuation a prompt, greedy unless ``temperature`` is above 0.

        ``chat=None`` talks to a model that has a chat template through it, and continues the text of one
        that has none.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        as_chat = self.is_chat if chat is None else chat
        ids = self.generate_ids(
            [self.encode(prompt, chat=as_chat) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            use_cache=use_cache,
            progress=progress,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        use_cache: bool = True,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """``generate`` from encoded prompts, without the ids that end an answer."""
        rows = self.write(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size,
            use_cache=use_cache, logprobs=False, progress=progress,
        )  # fmt: skip
        return [row.ids for row in rows]

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        use_cache: bool = True,
        logprobs: bool = True,
        progress: Progress | None = None,
    ) -> list[Written]:
        """``generate_ids`` with how likely the model found each token that it wrote, from the same passes."""
        return write(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            end_ids=self.end_ids,
            batch_size=batch_size,
            device=self.device,
            logprobs=logprobs,
            use_cache=use_cache,
            progress=progress,
        )

    @torch.no_grad()
    def logprobs(
        self,
        prompts: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        chat: bool = False,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Scored]]:
        """Token log-probabilities of each candidate answer of each prompt. Each prompt is read once."""
        return self.score(
            [self.encode(prompt, chat=chat) for prompt in prompts],
            [[encode_answer(self.tokenizer, a, after_space=not chat) for a in group] for group in answers],
            batch_size=batch_size,
            progress=progress,
        )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        *,
        batch_size: int = 32,
        moments: bool = False,
        progress: Progress | None = None,
    ) -> list[list[Scored]]:
        """``logprobs`` of encoded prompts and answers; ``moments`` adds those of the model's own distribution."""
        return score_answers(
            self.model, prompts, answers, device=self.device, batch_size=batch_size, moments=moments, progress=progress
        )

    @torch.no_grad()
    def score_texts(
        self,
        texts: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
        moments: bool = False,
        progress: Progress | None = None,
    ) -> list[Scored]:
        """Token log-probabilities of encoded texts, from the second token on."""
        return score_texts(
            self.model, texts, device=self.device, batch_size=batch_size, moments=moments, progress=progress
        )


def _name(model: nn.Module) -> str:
    if is_hooked(model):
        return str(model.cfg.model_name)  # type: ignore[union-attr]
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
