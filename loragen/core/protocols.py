"""The contracts of plugins. A plugin imports this module and `loragen`, nothing else of the core.

Every class has a nested pydantic ``Config`` (``extra="forbid"``, each field documented with its
unit). The core validates the user's options with it and passes it to the constructor.
`loragen.testing` checks the contracts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

if TYPE_CHECKING:
    import numpy as np
    from lightning.pytorch.loggers import Logger
    from torch import Tensor

Status = Literal["success", "failed", "interrupted"]


class Rate(NamedTuple):
    """The learning rate of one optimizer step."""

    learning_rate: float
    stage: int
    """The stage of the schedule, counted from 1."""


class Schedule(Protocol):
    """A pure function of the step, without state: a resumed run has the same rates."""

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any) -> None: ...

    def __call__(self, step: int, total_steps: int) -> Rate:
        """Returns the rate of optimizer step `step`, counted from 1 to `total_steps`."""
        ...


@dataclass(frozen=True)
class RunInfo:
    """The run that a logger opens."""

    directory: Path
    """The run directory. A logger writes below it only."""
    name: str
    project: str
    config: Mapping[str, Any]
    """The resolved configuration, plain data."""
    resume_id: str | None = None
    """The `run_id` of the run that is resumed, if any."""
    resume_step: int = 0
    """Steps done by the run that is resumed; what it logged after them has to be dropped."""


class RunLogger(Protocol):
    """Opens a Lightning logger for a run, and closes it with the run's status.

    It is used in the main process only. Lightning's `finalize` is called first, then `close`. A
    UsageError of the constructor or of `open` stops the command; after any other exception the
    training continues without the logger.
    """

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any) -> None: ...

    def open(self, run: RunInfo) -> Logger: ...

    @property
    def run_id(self) -> str | None:
        """The id of the run at its service, if it has one; stored in the manifest."""
        ...

    def close(self, status: Status) -> None: ...


class Encoder(Protocol):
    """An ``nn.Module`` from texts to embeddings.

    ``encoder(texts)`` returns embeddings ``[prompts, positions, dim]`` and a boolean mask
    ``[prompts, positions]`` that is False on padding. A sentence encoder has one position. The
    embedding of a text does not depend on the other texts.

    An encoder that is not `frozen` is trained with the decoder: gradients reach its parameters with
    ``requires_grad``, its ``state_dict`` holds all that training changes, and its embeddings are
    computed at every step instead of once.

    An encoder may have an attribute `libraries`, the names of the distributions that compute its
    embeddings beside its own: embeddings are cached under their versions.
    """

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any) -> None: ...

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    @property
    def frozen(self) -> bool: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A hash of the weights: it changes when the same text is embedded differently."""
        ...


@dataclass(frozen=True)
class TokenGrid:
    """An adapter as a decoder generates it: `tokens` rows of `token_dim` values, and the origin of
    each token, so that a decoder can share weights over layers or work in chunks.

    `layer`, `module`, `matrix` and `position` are int64 arrays of shape ``[tokens]``, each counted
    from 0 without gaps: the transformer layer, the kind of module (q_proj, ...), the kind of
    matrix (lora_A, lora_B), and the token's position in its matrix.
    """

    tokens: int
    token_dim: int
    layer: np.ndarray
    module: np.ndarray
    matrix: np.ndarray
    position: np.ndarray


class Decoder(Protocol):
    """An ``nn.Module`` from a condition to the token grid of an adapter.

    ``decoder(condition, mask)`` maps ``[batch, prompts, positions, dim]`` and a boolean mask
    ``[batch, prompts, positions]`` to ``[batch, tokens, token_dim]``, for any number of prompts.
    The first line of the class's docstring tells what makes an adapter: `gen train --dry-run` and
    every adapter's card quote it.
    """

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any, condition_dim: int, grid: TokenGrid) -> None: ...

    def __call__(self, condition: Tensor, mask: Tensor) -> Tensor: ...


class Samples(Protocol):
    """Example adapters, normalised, ``[samples, tokens, token_dim]`` float32.

    They are read from disk when indexed: ``samples[first:last]`` are those tokens of all samples.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def __getitem__(self, tokens: slice) -> Tensor: ...


@runtime_checkable
class StartsFromSamples(Protocol):
    """A decoder that is initialised from example adapters before its first step (optional)."""

    def start_from(self, samples: Samples) -> None: ...


class CollectedAdapters(Protocol):
    """The collected adapters of the N training datasets, one of each, normalised, float32.

    They stay on disk, memory-mapped: a collection of thousands need not fit into memory.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(N, tokens, token_dim)``"""
        ...

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        """Returns ``[datasets, tokens, token_dim]``: those tokens of those datasets' adapters."""
        ...


class SupportSet(NamedTuple):
    """Conditions of M datasets, to predict the adapters of a batch from."""

    condition: Tensor
    """``[M, prompts, positions, dim]``"""
    mask: Tensor
    """``[M, prompts, positions]`` bool"""
    datasets: Tensor
    """``[M]`` int64: their indices among the N datasets."""
    left_out: Tensor
    """``[batch, M]`` bool: whether adapter b must be predicted without dataset m; at least
    one is left."""


@runtime_checkable
class Transfers(Protocol):
    """A decoder that makes adapters from the collected adapters of other datasets.

    These, and the prompts of their datasets, are its support set. Training leaves the dataset whose
    adapter is predicted out of it, so that the decoder learns to serve datasets that were never
    collected (the objective `transfer`). The adapters are stored beside the decoder's state dict
    and are not part of it.

    Adapters are normalised by a scale alone, without a mean, because the mean would contain what is
    left out. What does not read the left-out adapter is therefore independent of it, to the bit.
    """

    def use_adapters(self, adapters: CollectedAdapters) -> None:
        """Is called once, before anything else and before the state dict is loaded."""
        ...

    def predict(self, condition: Tensor, mask: Tensor, support: SupportSet) -> Tensor:
        """Returns ``[batch, tokens, token_dim]`` for `condition` and `mask`, as in `Decoder`."""
        ...

    def fit(self, support_conditions: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Changes the decoder's state dict so that its forward pass gives what `predict` gives with
        all N datasets and none left out.

        `support_conditions` are their conditions ``[1, prompts, positions, dim]`` with masks, in
        order. `predict` does not change: training may continue.
        """
        ...

    def coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Returns ``[batch, N]``, after `fit`: each adapter's share in the generated ones, which is
        told to the user. A decoder with several coefficients for an adapter returns their mean.
        What they lack to 1 is the share of an adapter that is trained on all datasets together."""
        ...


@runtime_checkable
class TrainsOneAdapter(Protocol):
    """A decoder of `Transfers` whose only trained part is one adapter, for the rows of all datasets
    alike (a multi-task adapter). Nothing is predicted in training then."""

    def trained_adapter(self) -> Tensor:
        """Returns ``[tokens, token_dim]``, with gradients."""
        ...


@runtime_checkable
class DescribesChoices(Protocol):
    """A decoder that chooses some of its sizes itself."""

    def choices(self) -> list[str]:
        """Returns a sentence for each choice and its reason, for `gen train --dry-run`."""
        ...


class Metric(NamedTuple):
    """The validation metric by which a training keeps a step; lower is better."""

    name: str
    """A key of `Objective.validate`."""
    description: str
    """The quantity that it measures on held-out data, such as "the reconstruction error"."""
    tolerance: float = 0.0
    """A later step replaces the kept one if it is worse by no more than this, because it has
    trained longer."""


class Automatic(NamedTuple):
    """How `training.objective: auto` uses an objective: the first that can be trained is chosen."""

    order: int
    """Objectives are tested in ascending order: transfer 10, behaviour 20, reconstruction 30."""
    phases: str
    """The value of `training.objective` that `auto` stands for: `reconstruction-then-behaviour`."""
    reason: str
    """Why it can be trained, for `gen train --dry-run`."""


class Objective(Protocol):
    """What a generator is trained for, in one phase of `gen train`.

    Derive from this class; its methods with a body are optional. `training.objective` names one
    objective, or several in a row, `A-then-B`; each is a phase of the training. (A `stage` is part
    of a schedule.) The options are `training.objective_options.<name>`.

    `network` is an `nn.Module`; ``network(condition, mask)`` maps ``[batch, prompts, positions,
    dim]`` and a mask to normalised adapters ``[batch, tokens, token_dim]``. A batch is a named
    tuple with `condition`, `mask` and `tokens`, the collected adapters ``[batch, tokens,
    token_dim]``, not normalised; `TrainingData.pairs` makes such batches.
    """

    Config: ClassVar[type[BaseModel]]
    needs_base: ClassVar[bool] = False
    """Whether it needs the base model, `data.base`, and labelled rows of every dataset."""
    automatic: ClassVar[Automatic | None] = None
    """None: `auto` never chooses it."""
    gradient_clip_val: ClassVar[float | None] = None
    """The largest gradient norm if `trainer.gradient_clip_val` is null."""
    learning_rate_key: ClassVar[str] = "learning rate"
    """The configuration key of its learning rate, for messages."""
    leaves_out: ClassVar[bool] = False
    """Whether it trains decoders that are `Transfers`, and these alone."""

    steps: int
    """Optimizer steps of the phase."""
    learning_rate: float
    """The `learning_rate` of a schedule that has this option and leaves it at its default."""
    batch_size: int
    """Pairs of a micro-batch, of all processes."""
    metric: Metric
    """The metric by which a step is kept, if this is the last phase."""

    @classmethod
    def obstacle(cls, config: Any, sources: Sequence[Any]) -> str | None:  # noqa: ARG003
        """Returns why it cannot be trained with this `GenTrainConfig` on these sources, or None.

        It is called before anything heavy is loaded. If ``config.training.objective`` is "auto",
        the question is whether `auto` may choose it.
        """
        return None

    def __init__(self, options: Any, data: Any) -> None:
        """`data` is the `TrainingData` of `loragen.core.learning.data`."""

    def batches(self, process_index: int, num_processes: int) -> Any:
        """Returns a `torch.utils.data.Dataset` whose item k is this process's share of micro-batch
        k of the phase, counted from 0: a pure function of the seed, k and the process.

        Raises UsageError if the processes cannot share a micro-batch equally.
        """
        ...

    def loss(self, network: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss to minimise and detached metrics, `loss` among them."""
        ...

    def validate(self, network: Any, batch: Any) -> dict[str, Tensor]:
        """Returns the metrics of one held-out pair of a dataset, `metric.name` among them.

        The last phase's objective validates throughout the training.
        """
        ...

    def finalize(self, network: Any) -> None:
        """May change the network before it is validated or saved; training continues with it."""

    def to(self, device: Any) -> None:
        """Moves tensors that the objective holds to the device of the training."""
