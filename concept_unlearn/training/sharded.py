"""A copy of the model that is trained in shares, one a process (FSDP2): for optimisers that fit nowhere whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.processes import Processes
from ..errors import InvalidConfig
from ..lm import LM
from ..lm.head import Ending, Head
from ..lm.locate import blocks, is_hooked
from ..step import LiveReference
from ..weights import Delta, Dense
from .trainable import Trainable, flags_restored, matching


def is_sharded() -> bool:
    """Whether the launcher (``accelerate config``) asks for FSDP. Raises InvalidConfig for DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        raise InvalidConfig("ACCELERATE_USE_DEEPSPEED is set: finetuning shards by FSDP, or shares a step's rows (DDP)")
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    return wanted and Processes.here().world > 1


class Shares(Trainable):
    """Parameters in float32 (float64 stays), each process with its share; the model that was given is the reference."""

    sharded = True

    def __init__(self, lm: LM, own: LM, parameters: dict[str, nn.Parameter]) -> None:
        self.lm, self.parameters, self._own = lm, parameters, own

    def reference(self, head: Ending) -> LiveReference:
        return LiveReference(self._own, Head(self._own.model))

    def whole(self, tensor: Any) -> Tensor:
        found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return found

    def share(self, whole: Tensor, like: Any) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self.lm.device), like.device_mesh, like.placements)

    def written(self) -> None:
        """What a pass without gradients had gathered would be used again."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.lm.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def deltas(self) -> dict[str, Delta]:
        """Every process takes part, and has all of them."""
        found: dict[str, Delta] = {}
        for name, own in self._own.model.named_parameters():
            if name in self.parameters:
                change = self.whole(self.parameters[name].data).to(own.device)
                change = change - own.to(change.dtype)
                if change.any():
                    found[name] = Dense(change)
        return found


@contextmanager
def train_shares(lm: LM, patterns: Sequence[str] | None) -> Iterator[Shares]:
    """Each process needs room for the whole model beside its share. Raises as ``train_weights`` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if is_hooked(lm.model):
        raise InvalidConfig(f"{type(lm.model).__name__} cannot be sharded: give the Hugging Face model itself")
    matching(lm.model, patterns)
    with flags_restored(lm.model):
        model = copy.deepcopy(lm.model)
        model = model if lm.dtype == torch.float64 else model.float()
        mesh = init_device_mesh(lm.device.type, (Processes.here().world,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        chosen = matching(model, patterns)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        yield Shares(LM(model, lm._tokenizer, name=lm.name), lm, chosen)
