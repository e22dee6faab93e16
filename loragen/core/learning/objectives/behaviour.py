"""Generated adapters inside the live base, several at once, with gradients into their weights.

Each row of a forward pass has its own adapter. This is `torch.func.functional_call` of a PeftModel
once per adapter (a test compares them), in one pass: h + s · B (A x) as two batched products.

What a generated adapter is judged by: the weights it should have, or what it makes the base do.

Both take tokens as the decoder writes them, normalised, ``[batch, tokens, token_dim]``.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loragen.core.adapter.files import module_scaling
from loragen.core.adapter.layout import Layout
from loragen.core.base.load import LanguageModel
from loragen.core.config.schema import GenTrainingSection
from loragen.core.errors import LoragenError
from loragen.core.generator.network import Normalization
from loragen.core.learning.objectives.reconstruction import weighted_error
from loragen.core.learning.objectives.transfer import KnownDatasets
from loragen.core.lora.packing import IGNORED, Batch, answer_logits, rows_right, token_losses

PREFIX = "base_model.model."  # of PEFT's file keys


class Injection:
    """The places of a layout's matrices in a base model."""

    def __init__(self, model: nn.Module, layout: Layout, adapter_config: Mapping[str, Any]) -> None:
        """Raises LoragenError where the adapter is no plain LoRA on linear modules of the base."""
        self.modules: dict[str, nn.Module] = {}
        self.scaling: dict[str, float] = {}
        there = dict(model.named_modules())
        output = model.get_output_embeddings()  # type: ignore[operator]  # transformers' own
        for spec in layout.tensors:
            path = spec.key.removeprefix(PREFIX).partition(".lora_")[0]
            if spec.matrix not in ("lora_A", "lora_B") or len(spec.shape) != 2:
                raise LoragenError(
                    f"{spec.key}: only lora_A and lora_B of linear modules are known"
                )
            if path not in there:
                raise LoragenError(f"the base has no module {path}, which the adapter changes")
            if there[path] is output:
                raise LoragenError(f"{path}: adapters on the output layer are not trained through")
            self.modules[path] = there[path]
            self.scaling[path] = module_scaling(adapter_config, path)

    @contextmanager
    def injected(self, adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the base's batch is cut into as many equal parts as there are adapters,
        one after the other: ``{file key: [adapters, rows, columns]}``.

        Raises LoragenError in the forward pass where a module does not see the whole batch, as the
        routed experts of a mixture do not."""
        with ExitStack() as hooks:
            for path, module in self.modules.items():
                a, b = (adapters[f"{PREFIX}{path}.lora_{which}.weight"] for which in "AB")
                hook = _Added(a, b, self.scaling[path])
                hooks.callback(module.register_forward_hook(hook).remove)
            yield


class _Added:
    """A forward hook that adds every part's own scaled B A x."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        self.a, self.b, self.scaling = a, b, scaling  # (D, r, in), (D, out, r)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.ndim != 3 or len(x) % len(self.a):
            raise LoragenError(
                f"a module sees {list(x.shape)} of the batch, which {len(self.a)} adapters do not "
                "share equally (a routed expert?): set training.objective=reconstruction"
            )
        parts = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a)  # (D, rows * T, in)
        low = torch.bmm(parts, self.a.transpose(1, 2))  # (D, rows * T, r)
        added = torch.bmm(low, self.b.transpose(1, 2))  # (D, rows * T, out)
        return output + (self.scaling * added).view_as(output).to(output)


Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss to descend on, and what is logged of it (detached)."""


class Reconstruction:
    """`mse_weight · MSE + l1_weight · L1` on normalised tokens, under the mask.

    With importance, an error counts as much as its token is settled: by ``1 / (1 + v)``, v being
    the token's variance within a collection over its variance between collections (as Drag-and-Drop
    LLMs weigh by the variance between checkpoints), scaled to a mean of 1.
    """

    def __init__(
        self,
        normalization: Normalization,
        mask: Tensor,
        options: GenTrainingSection,
        weights: Tensor,
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
        base: LanguageModel,
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
