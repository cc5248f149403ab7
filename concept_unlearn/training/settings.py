"""How to train: fields that a method takes over as its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..component import Frozen


class Watch(Frozen):
    """Measure what is forgotten and kept while training, stop in time, and keep the best.

    The best is the lowest probability of the forget answers among those that keep enough.
    """

    every: float = Field(1.0, gt=0)
    """Epochs."""
    keep: float = Field(0.95, gt=0, le=1)
    """Share of the untouched model's probability of retained answers that were held out of training."""
    patience: int = Field(2, gt=0)
    """How many times in a row too little may be kept before training stops."""
    passages: int = Field(32, gt=0)
    """Of each kind, at most; at most a tenth of the retained ones are held out."""


class PrimalDual(Frozen):
    """The weight of what retains as a dual variable: alpha <- max(0, alpha + eta (R - eps)) (PDU, arXiv 2506.05314)."""

    eps: float | None = None
    """The retained loss that is asked for; 1.1 times the untouched model's where not given."""
    alpha: float = Field(50.0, ge=0)
    """To begin with."""
    eta: float = Field(1.0, ge=0)
    every: Literal["step", "epoch"] = "step"
    """An epoch's R is measured on all retained rows, a step's is the step's own."""
    warm_up: float = Field(5.0, ge=0)
    """Epochs in which alpha stays, at most half of the run."""


class Optimisation(Frozen):
    """AdamW on fp32 weights, dropout off; every count is of an optimiser step, over all processes."""

    lr: float = Field(1e-5, gt=0)
    epochs: float = Field(5.0, gt=0)
    """Over the forget set."""
    max_steps: int | None = Field(None, gt=0)
    """Instead of epochs."""
    batch_size: int = Field(32, gt=0)
    """Forget items an optimiser step."""
    micro_batch: int = Field(8, gt=0)
    """Rows that go through the model at a time; changes memory and speed, never a result."""
    retain_per_forget: int = Field(1, gt=0)
    """Retained items drawn for each forget item, from one permutation of them after another."""
    alternate: bool = False
    """Not both in every step: an epoch on what is kept, then one on what is forgotten, with as many steps each. There
    are twice as many steps, and each item comes up as often as without it.
    """
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warm_up: float = Field(1.0, ge=0)
    """Epochs in which it rises, at most half of the run."""
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""
    max_length: int = Field(512, gt=1)
    """Tokens of a row: beyond it the beginning of a prompt is cut, then the end of an answer."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the arithmetic; auto is bf16 where the model came in half precision. The weights trained are fp32."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time."""
    balance: PrimalDual | None = None
    """None leaves every objective its own weight."""
    watch: Watch | None = None
    checkpoint_every: int = Field(200, gt=0)
    """Optimiser steps."""
    seed: int = 0
