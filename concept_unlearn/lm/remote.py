"""A model in another process, asked over HTTP: it can be scored, continued and unlearned beside, and nothing else.

The endpoint is OpenAI's ``/v1/completions`` as vLLM serves it, asked with token ids for the log-probabilities of the
whole vocabulary: ``{"prompt": [[ids], ...], "max_tokens": 1, "echo": true, "logprobs": V, "temperature": 0,
"return_tokens_as_token_ids": true, "full_logprobs": true}``. Of each prompt it may answer in one of two ways:

    choices[i].logprobs.top_logprobs   as everywhere, a mapping a position, its tokens written ``token_id:7``
    choices[i].logprobs.full           base64 of little-endian float32, a row a position that something follows

Without ``echo`` there is one position, the last. Log-probabilities are logits up to a constant, which no softmax sees.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..endpoint import post_json
from ..errors import EndpointFailed

_TOKEN = "token_id:"


class RemoteConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "remote_logits"


class RemoteLogits(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """``LM(RemoteLogits("http://host:8000", "big", vocabulary=50000), tokenizer, name="big")``.

    Its key-value cache holds token ids, so whatever is done to a cache is done to them, and every pass asks anew.
    Raises EndpointFailed where the endpoint is silent, late, refuses, or leaves out a part of the vocabulary.
    """

    config_class = RemoteConfig

    def __init__(
        self,
        url: str,
        name: str,
        *,
        vocabulary: int,
        context: int = 4096,
        end_id: int | None = None,
        key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        """``vocabulary`` logits are asked for; ``key`` goes into the header, ``timeout`` is in seconds."""
        super().__init__(
            RemoteConfig(
                vocab_size=vocabulary, max_position_embeddings=context, num_hidden_layers=1, hidden_size=1,
                num_attention_heads=1, eos_token_id=end_id,
            )
        )  # fmt: skip
        self._url, self._name, self._key, self._timeout = f"{url.rstrip('/')}/v1/completions", name, key, timeout
        digest = hashlib.sha256(f"{self._url} {name}".encode()).digest()
        # A fingerprint of weights is all that tells models apart, so it has some.
        self.identity = nn.Parameter(torch.tensor(list(digest), dtype=torch.float32), requires_grad=False)

    def get_input_embeddings(self) -> None: ...

    def get_output_embeddings(self) -> None: ...

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch total"] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        ids, n = input_ids, input_ids.shape[1]
        real = torch.ones_like(ids) if attention_mask is None else attention_mask[:, -n:].long()
        if past_key_values is not None:
            both = (x[:, None, :, None] for x in (ids, real))
            ids, real = (x[:, 0, :, 0] for x in past_key_values.update(*both, 0))
        keep = logits_to_keep or n
        rows = [row[mask.bool()].tolist() for row, mask in zip(ids, real, strict=True)]
        said = self._ask(rows, last=keep == 1 and bool(real[:, -1].all()))
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for i, found in enumerate(said):
            logits[i, real[i].nonzero()[-len(found) :, 0]] = found
        return CausalLMOutputWithPast(logits=logits[:, -keep:].to(self.device), past_key_values=past_key_values)

    def _ask(self, rows: Sequence[Sequence[int]], *, last: bool) -> list[Float[Tensor, "positions vocab"]]:
        """Log-probabilities of what follows each position, or only the last, of each row."""
        question = {
            "model": self._name, "prompt": rows, "max_tokens": 1, "echo": not last, "temperature": 0,
            "logprobs": self.config.vocab_size, "return_tokens_as_token_ids": True, "full_logprobs": True,
        }  # fmt: skip
        answer = post_json(self._url, question, key=self._key, timeout=self._timeout)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
            found = [self._read(c["logprobs"], 1 if last else len(row)) for c, row in zip(choices, rows, strict=True)]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, binascii.Error) as error:
            raise EndpointFailed(
                f"{self._url} answered something else than log-probabilities of {len(rows)} prompts ({error!r}): "
                f"{str(answer)[:200]}"
            ) from error
        return found

    def _read(self, logprobs: Mapping[str, Any], n: int) -> Float[Tensor, "n vocab"]:
        vocabulary = self.config.vocab_size
        if "full" in logprobs:
            flat = np.frombuffer(base64.b64decode(logprobs["full"]), dtype="<f4")
            said = torch.from_numpy(flat.reshape(n, -1).copy())
        else:
            said = torch.full((n, vocabulary), float("nan"))
            for row, top in zip(said, logprobs["top_logprobs"][-n:], strict=True):
                ids = [int(token.removeprefix(_TOKEN)) for token in top]
                inside = [(i, value) for i, value in zip(ids, top.values(), strict=True) if i < vocabulary]
                row[[i for i, _ in inside]] = torch.tensor([value for _, value in inside])
        there = int((~said[:, :vocabulary].isnan()).sum(1).min())
        if there < vocabulary:
            raise EndpointFailed(
                f"{self._url} gave {there} of {vocabulary} log-probabilities: an offset needs the whole vocabulary "
                "(vLLM: --max-logprobs -1)"
            )
        return said[:, :vocabulary]
