"""Which weights are trained at all: a mask made of the model's gradients before training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..activations.processes import Processes
from ..component import Frozen
from ..errors import CorruptArtifact, InvalidConfig
from ..files import save_tensors
from ..lm.head import Ending
from ..step import Batch, Read, Step
from ..weights.bits import packed, unpacked
from ..weights.masks import largest
from ..weights.scores import Evidence, WagleWeightScore, WeightScore
from .plan import SIDES, Data
from .rows import Row
from .trainable import Trainable


class Mask(Frozen):
    """Train the weights of largest score, over all trained parameters together, and leave the others bit for bit.

    It costs one pass over what is to be forgotten and one over what is to be kept, of those that the score reads.
    Weight decay is of the trained weights only.
    """

    score: WeightScore = WagleWeightScore()
    ratio: float = Field(0.8, gt=0, le=1)
    """Share of the weights that are trained; 1 is as without a mask."""
    forget: Literal["forget", "refusal"] = "forget"
    """Whose loss g_f is of: the answers to be forgotten, or refusals in their place (the paper's for preferences)."""

    @property
    def splits(self) -> tuple[str, ...]:
        names = {"forget": self.forget, "retain": "retain", "inputs": self.forget}
        return tuple(dict.fromkeys(names[source] for source in self.score.reads))


@dataclass(frozen=True)
class Attribution:
    """Takes gradients of ``trainable`` on ``data``, as the model is now; nothing of it is changed."""

    trainable: Trainable
    data: Data
    head: Ending
    autocast: Callable[[], AbstractContextManager[object]]
    micro_batch: int = 8

    def choose(self, mask: Mask, *, folder: Path | None = None) -> dict[str, Bool[Tensor, "*shape"]]:
        """int(N * ratio) weights, equal scores in the order of parameters; from ``folder`` where they are there.

        Beside the model it takes room for two gradients, on the CPU. Raises InvalidConfig for a ratio that leaves
        nothing, NonFinite, and CorruptArtifact for a file that cannot be read.
        """
        parameters = self.trainable.parameters
        path = None if folder is None else folder / "mask.safetensors"
        if path is not None and path.is_file():
            chosen = _load(path, parameters)
        else:
            n = int(sum(p.numel() for p in parameters.values()) * mask.ratio)
            if n == 0:
                raise InvalidConfig(f"mask.ratio: {mask.ratio} of these parameters is not one weight")
            chosen = largest(_Scores(mask.score, self.evidence(mask)), n)
            if path is not None and Processes.here().rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(path, {name: packed(m) for name, m in chosen.items()}, {})
        Processes.here().wait()
        return {name: m.to(parameters[name].device) for name, m in chosen.items()}

    def evidence(self, mask: Mask) -> Evidence:
        weights = {name: p.detach() for name, p in self.trainable.parameters.items()}
        wide = torch.float64 if torch.float64 in {w.dtype for w in weights.values()} else torch.float32
        read = mask.score.reads
        return Evidence(
            {name: w.to(wide) for name, w in weights.items()},
            forget=self.gradient(mask.forget) if "forget" in read else {},
            retain=self.gradient("retain") if "retain" in read else {},
            inputs=self.inputs(mask.forget) if "inputs" in read else {},
        )

    def gradient(self, split: str) -> dict[str, Tensor]:
        """Of the mean loss of a token of the split, on the CPU, whatever the batches are."""
        parameters, n = self.trainable.parameters, sum(len(row.ids) - row.n_prompt for row in self._rows(split))
        try:
            for batch in self._batches(split, alike=False):
                with self.autocast():
                    step = Step(self.trainable.lm, {split: batch}, [Read(split)], head=self.head)
                    loss = step.nll(split).sum() / n
                loss.backward()
            return {name: _total(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in parameters.items()}
        finally:
            for p in parameters.values():
                p.grad = None

    @torch.no_grad()
    def inputs(self, split: str) -> dict[str, Tensor]:
        """Of linear layers' weights, the root mean square of each input, to be broadcast over the weight.

        Raises InvalidConfig where a parameter is none of those.
        """
        model, n = self.trainable.lm.model, sum(len(row.ids) for row in self._rows(split))
        owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        if odd := [name for name, p in self.trainable.parameters.items() if id(p) not in owners]:
            raise InvalidConfig(
                f"wanda scores weights of linear layers, which {odd[0]} and {len(odd) - 1} others are not: name the "
                'parameters to train, e.g. parameters: ["*_proj.weight"]'
            )
        layers = {name: owners[id(p)] for name, p in self.trainable.parameters.items()}
        squares: dict[str, Tensor] = {}

        def add(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            squares[name] = squares.get(name, x.new_zeros(x.shape[-1])) + x.square().sum(0)

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
            for batch in self._batches(split, alike=True):
                with self.autocast():
                    self.head.hidden(batch.ids, batch.mask)
        found = {}
        for name, layer in layers.items():
            theta, axis = self.trainable.parameters[name], int(isinstance(layer, nn.Linear))  # Conv1D holds [in, out]
            square = squares.get(name, torch.zeros(theta.shape[axis], device=theta.device))  # of an idle expert
            norm = (_total(square) / n).sqrt()
            found[name] = norm if axis else norm[:, None]
        return found

    def _batches(self, split: str, *, alike: bool) -> Iterator[Batch]:
        """Those of this process; with ``alike`` of rows of one length, so that nothing is padding."""
        lengths = self.data.splits[split].lengths
        rows = sorted(self._indices(split), key=lambda i: (lengths[i], i))
        parts: list[list[int]] = [[]]
        for i in rows:
            if len(parts[-1]) == self.micro_batch or (alike and parts[-1] and lengths[parts[-1][0]] != lengths[i]):
                parts.append([])
            parts[-1].append(i)
        rank, world = Processes.here()
        for part in parts[rank::world]:
            yield self.data.splits[split].batch(part, self.trainable.lm.device)

    def _indices(self, split: str) -> list[int]:
        """The rows that are trained on, in the first epoch."""
        return [self.data.splits[split].row_of(i, 0) for i in self.data.items[SIDES[split]]]

    def _rows(self, split: str) -> Sequence[Row]:
        return [self.data.splits[split].rows[i] for i in self._indices(split)]


class _Scores(Mapping[str, Tensor]):
    """Each computed when it is asked for, so that no more than one is held."""

    def __init__(self, score: WeightScore, known: Evidence) -> None:
        self._score, self._known = score, known

    def __getitem__(self, name: str) -> Tensor:
        return self._score(self._known, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known.weights)

    def __len__(self) -> int:
        return len(self._known.weights)


def _total(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the CPU."""
    Processes.here().sum(tensor)
    return tensor.detach().cpu()


def _load(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    try:
        kept = load_file(path)
    except SafetensorError as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}): delete it to have it computed anew") from None
    return {name: unpacked(kept[name], p.shape) for name, p in parameters.items()}
