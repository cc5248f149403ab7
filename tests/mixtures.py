"""Tiny mixtures of experts, built from configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from conftest import BOS, D_MODEL, EOS, N_LAYERS, PAD, VOCAB

_SHARED = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    "max_position_embeddings": 256, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
MIXTURES = {
    "mixtral": lambda: transformers.MixtralConfig(**_SHARED, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SHARED, num_experts=4, moe_intermediate_size=16),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SHARED, num_local_experts=4),
}


def make_mixture(kind: str = "mixtral", seed: int = 0) -> Any:
    """4 experts a block, 2 of them for each token."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MIXTURES[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = EOS
    return model.eval()
