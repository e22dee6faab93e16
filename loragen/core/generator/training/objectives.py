"""What a generated adapter is judged by: the weights it should have, or what it makes the base do.

Both take tokens as the decoder writes them, normalised, ``[batch, tokens, token_dim]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loragen.core.base_models import BaseModel
from loragen.core.config.gen_schema import GenTraining
from loragen.core.generator.layout import Layout
from loragen.core.generator.normalization import Normalization
from loragen.core.generator.training.injection import Injection
from loragen.core.generator.training.transfer import KnownDatasets
from loragen.core.generator.training.weighted_error import weighted_error
from loragen.core.lora.batch import IGNORED, Batch
from loragen.core.lora.loss import answer_logits, rows_right, token_losses

Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss to descend on, and what is logged of it (detached)."""


class Reconstruction:
    """`mse_weight · MSE + l1_weight · L1` on normalised tokens, under the mask.

    With importance, an error counts as much as its token is settled: by ``1 / (1 + v)``, v being
    the token's variance within a collection over its variance between collections (as Drag-and-Drop
    LLMs weigh by the variance between checkpoints), scaled to a mean of 1.
    """

    def __init__(
        self, normalization: Normalization, mask: Tensor, options: GenTraining, weights: Tensor
    ) -> None:
        """`mask` is the layout's ``[tokens, token_dim]`` bool, `weights` are ``[tokens, 1]``."""
        self.normalization, self.options = normalization, options
        self.weights = mask * weights / mask.sum()  # (tokens, token_dim): sums to 1
        self.mask = mask

    def to(self, device: torch.device) -> None:
        self.normalization = self.normalization.to(device)
        self.weights, self.mask = self.weights.to(device), self.mask.to(device)

    def __call__(self, written: Tensor, target: Tensor, noise: float = 0.0) -> Losses:
        """`target`: adapters as they are, not normalised; `noise`: standard deviation of what is
        added to them, in units of their own spread."""
        loss, mse, l1 = weighted_error(
            written,
            target,
            self.normalization,
            self.weights,
            mse_weight=self.options.mse_weight,
            l1_weight=self.options.l1_weight,
            noise=noise,
        )
        return loss, {"loss": loss.detach(), "mse": mse, "l1": l1}

    @torch.no_grad()
    def in_own_units(self, written: Tensor, target: Tensor) -> dict[str, Tensor]:
        """How far the weights themselves are off."""
        error = (written.float() - self.normalization.normalize(target)) * self.normalization.scale
        error = torch.where(self.mask, error, 0.0)
        count = self.mask.sum() * len(error)
        norm = torch.linalg.vector_norm(torch.where(self.mask, target, 0.0))
        return {
            "mae": error.abs().sum() / count,
            "rmse": (error.square().sum() / count).sqrt(),
            "relative_error": torch.linalg.vector_norm(error) / norm,
        }


class Behaviour:
    """The language-model loss of the base, with every generated adapter in its place, on rows of
    the adapter's own dataset."""

    def __init__(
        self,
        base: BaseModel,
        layout: Layout,
        normalization: Normalization,
        adapter_config: Mapping[str, Any],
    ) -> None:
        """Raises LoragenError where the adapter is no plain LoRA on linear modules of the base."""
        self.model, self.layout, self.normalization = base.model, layout, normalization
        self.injection = Injection(base.model, layout, adapter_config)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.normalization = self.normalization.to(device)

    def __call__(self, written: Tensor, rows: Batch) -> Losses:
        """`rows`: equally many of every adapter's dataset, in the order of the adapters.

        The mean over adapters of the mean over an adapter's answer tokens (nats): any split over
        devices has the same mean.
        """
        logits, tokens, owner = self._answers(written, rows)
        loss = mean_of_means(token_losses(logits, tokens), owner, len(written))
        return loss, {"behaviour": loss.detach()}

    @torch.no_grad()
    def accuracy(self, written: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
        """(the loss as above, share of rows whose greedy answer is right)."""
        logits, tokens, owner = self._answers(written, rows)
        loss = mean_of_means(token_losses(logits, tokens), owner, len(written))
        return loss, rows_right(logits, rows).float().mean()

    def _answers(self, written: Tensor, rows: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, tokens and the adapter of every answer token."""
        adapters = self.layout.unpack_several(self.normalization.denormalize(written.float()))
        with self.injection.injected(adapters):
            logits, tokens = answer_logits(self.model, rows)
        each = len(rows.ids) // len(written)
        sequence = torch.arange(len(rows.ids), device=rows.ids.device)[:, None]
        owner = (sequence // each).expand_as(rows.ids)[rows.targets != IGNORED]
        return logits, tokens, owner


@dataclass(frozen=True)
class Objectives:
    """All that a training judges adapters by."""

    reconstruction: Reconstruction
    behaviour: Behaviour | None = None
    reconstruction_weight: float = 0.0
    """Of the reconstruction beside the behaviour."""
    known: KnownDatasets | None = None
    """Where adapters are written from other datasets alone."""

    def to(self, device: torch.device) -> None:
        self.reconstruction.to(device)
        if self.behaviour:
            self.behaviour.to(device)


def mean_of_means(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """The mean over owners of the mean of each one's values."""
    sums = values.new_zeros(owners).index_add_(0, owner, values)
    return (sums / torch.bincount(owner, minlength=owners)).mean()
