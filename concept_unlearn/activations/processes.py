"""Which of several processes this one is, when ``accelerate launch`` or ``torchrun`` started it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, distributed


class Processes(NamedTuple):
    rank: int
    world: int

    @classmethod
    def here(cls) -> Processes:
        """Joins the others at first use; alone where nobody launched several."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1)
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def wait(self) -> None:
        """Until all have come this far."""
        if self.world > 1:
            distributed.barrier()

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """Everybody's numbers, by rank."""
        if self.world == 1:
            return [numbers]
        mine = torch.tensor(numbers, device=_device())
        found = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(found, mine)
        return [other.tolist() for other in found]

    def mean(self, tensor: Tensor) -> None:
        """In place, over all processes."""
        if self.world > 1:
            distributed.all_reduce(tensor)
            tensor /= self.world

    def sum(self, tensor: Tensor) -> None:
        """In place, over all processes."""
        if self.world > 1:
            distributed.all_reduce(tensor)

    def smallest(self, tensor: Tensor) -> None:
        """In place, over all processes."""
        if self.world > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MIN)


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
