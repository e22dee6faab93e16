"""Behaviour: the base model with the generated adapter should answer like the dataset's rows.

Several adapters run in one forward pass of the base, each on rows of its own dataset, with
gradients into their weights: ``h + s · B (A x)`` as two batched products per module. A test
compares this with `torch.func.functional_call` of a PeftModel, once per adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from loragen.core.adapter.checks import module_scaling
from loragen.core.adapter.layout import Layout
from loragen.core.base.checkpointing import gradient_checkpointing
from loragen.core.base.load import empty_base, is_local
from loragen.core.config import GenTrainConfig
from loragen.core.data.tokenize import Example
from loragen.core.errors import LoragenError, listing, one_line
from loragen.core.generator.network import Network, Normalization
from loragen.core.learning.data import (
    DistributedBatches,
    PairBatch,
    TrainingData,
    draw_texts,
    pair_of,
    stack_pairs,
)
from loragen.core.learning.objectives.reconstruction import (
    RECONSTRUCTION_METRIC,
    Losses,
    ReconstructionError,
)
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.packing import (
    IGNORED,
    Batch,
    answer_logits,
    rows_right,
    token_losses,
)
from loragen.core.protocols import Automatic, Metric, Objective

TOLERANCE = 0.01
"""Differences below it are chance, in nats of the base's loss on a few held-out rows."""
MAX_ON_CPU = 1_000_000_000
"""Parameters of a base that `auto` trains through without a GPU. A step of 32 rows of 40 tokens is
6 · 1280 operations a parameter at most: with this many half a minute at 250 GFLOP/s."""


class BehaviourBatches(DistributedBatches):
    """Micro-batches of adapters with labelled rows of their datasets.

    Every dataset is drawn equally often, whatever the number of its checkpoints.
    """

    def __init__(self, data: TrainingData, process_index: int, num_processes: int) -> None:
        """The sources of the data have labelled rows."""
        config, split = data.config, data.split(process_index, num_processes)
        size, setting = config.behaviour.batch_size, "behaviour.batch_size"
        super().__init__(len(data.sources), size, config.seed, split, setting)
        self.sources, self.collate = data.sources, data.collate
        self.rows_per_adapter = config.behaviour.rows_per_adapter
        self.prompts = config.data.prompts_per_condition

    def __getitem__(self, k: int) -> PairBatch:
        step, drawn = self.own(k)
        pairs: list[PairBatch] = []
        examples: list[Example] = []
        for position, index in drawn:
            random, source = Random(f"behaviour:{self.seed}:{step}:{position}"), self.sources[index]
            checkpoint = random.randrange(len(source.tokens))
            draw = f"prompts:{random.random()}"
            texts = draw_texts(source.texts_of(checkpoint), self.prompts, draw)
            pairs.append(pair_of(source, texts, checkpoint))
            assert source.rows is not None
            examples += draw_rows(source.rows.training, self.rows_per_adapter, random)
        return stack_pairs(pairs)._replace(rows=self.collate(examples, len(pairs)))


def draw_rows(rows: Sequence[Example], count: int, random: Random) -> list[Example]:
    """Returns `count` random rows, without repetition if there are that many."""
    return random.sample(rows, count) if len(rows) >= count else random.choices(rows, k=count)


class Behaviour(Objective):
    """Minimises the base model's loss on labelled rows, with the generated adapters injected.

    The reconstruction loss is added with the weight `behaviour.reconstruction_weight`.
    """

    needs_base = True
    automatic = Automatic(
        20,
        "reconstruction-then-behaviour",
        "the base and labelled rows of every dataset are available",
    )
    learning_rate_key = "behaviour.learning_rate"

    class Config(BaseModel, extra="forbid"):
        """There are no options here: they are in the section `behaviour`."""

    @classmethod
    def obstacle(cls, config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
        missing = [source.name for source in sources if not source.has_labels]
        if missing:
            return f"labelled rows are missing of {listing(missing, 3)}"
        if config.training.objective != "auto":
            return None
        base = config.behaviour.base_model or sources[0].base_model
        if not is_local(base):
            return f"the base model {base} is not on this machine"
        try:
            with torch.device("meta"):
                model = empty_base(base, True, config.trust_remote_code).model
        except LoragenError as error:
            return one_line(error)
        size = sum(parameter.numel() for parameter in model.parameters())
        has_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        if size > MAX_ON_CPU and not has_gpu:
            return f"the base model has {size / 1e9:.1f} B parameters, and there is no GPU"
        return None

    def __init__(self, options: Config, data: TrainingData) -> None:  # noqa: ARG002  # no options
        """Raises LoragenError if the adapter is no plain LoRA on linear modules of the base."""
        config = data.config.behaviour
        self.data, self.reconstruction = data, ReconstructionError(data)
        self.reconstruction_weight = config.reconstruction_weight
        assert data.base is not None  # needs_base
        self.base_loss = AdaptedBase(
            data.base.model,
            data.layout,
            data.normalization,
            data.adapter_config,
            checkpointed=config.gradient_checkpointing,
        )
        self.steps, self.batch_size = config.max_steps, config.batch_size
        self.learning_rate = config.learning_rate or 1e-4
        self.metric = RECONSTRUCTION_METRIC
        if data.validates_rows:
            described = "the base model's loss on held-out rows"
            self.metric = Metric("behaviour", described, TOLERANCE)

    def batches(self, process_index: int, num_processes: int) -> BehaviourBatches:
        return BehaviourBatches(self.data, process_index, num_processes)

    def predict(self, network: Network, batch: PairBatch) -> Tensor:
        """Returns the adapters of a training batch, ``[batch, tokens, token_dim]``, normalised."""
        tokens: Tensor = network(batch.condition, batch.mask)
        return tokens

    def loss(self, network: Network, batch: PairBatch) -> Losses:
        assert batch.rows is not None
        predicted = self.predict(network, batch)
        loss = self.base_loss(predicted, batch.rows)
        metrics = {"behaviour": loss.detach()}
        if self.reconstruction_weight:
            error, errors = self.reconstruction(predicted, batch.tokens)
            loss, metrics = loss + self.reconstruction_weight * error, errors | metrics
        return loss, {**metrics, "loss": loss.detach()}

    def validate(self, network: Network, batch: PairBatch) -> dict[str, Tensor]:
        predicted = self.predict_for_validation(network, batch)
        metrics = self.reconstruction.metrics(predicted, batch.tokens)
        if batch.rows is not None:
            loss, accuracy = self.base_loss.accuracy(predicted, batch.rows)
            metrics |= {"behaviour": loss, "accuracy": accuracy}
        return metrics

    def predict_for_validation(self, network: Network, batch: PairBatch) -> Tensor:
        """Returns the adapters of a validation batch, ``[batch, tokens, token_dim]``."""
        return self.predict(network, batch)

    def to(self, device: torch.device) -> None:
        self.reconstruction.to(device)
        self.base_loss.to(device)


class AdaptedBase:
    """The base model's loss on rows, with a generated adapter of each dataset injected."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        normalization: Normalization,
        adapter_config: Mapping[str, Any],
        checkpointed: bool = False,
    ) -> None:
        """With `checkpointed`, the base's activations are computed again in the backward pass.

        Raises LoragenError if the adapter is no plain LoRA on linear modules of the base.
        """
        self.model, self.layout, self.normalization = model, layout, normalization
        self.checkpointed = checkpointed
        self.injection = Injection(model, layout, adapter_config)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.normalization = self.normalization.to(device)

    def __call__(self, predicted: Tensor, rows: Batch) -> Tensor:
        """Returns the mean over adapters of the mean loss of an adapter's answer tokens, in nats.

        `predicted` is ``[adapters, tokens, token_dim]``, normalised; `rows` has equally many
        sequences for every adapter, in the order of the adapters. The mean is the same for any
        split of the adapters over devices.
        """
        return self._loss_and_logits(predicted, rows)[0]

    @torch.no_grad()
    def accuracy(self, predicted: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
        """Returns the loss, and the share of rows whose greedy answer is right."""
        loss, logits = self._loss_and_logits(predicted, rows)
        return loss, rows_right(logits, rows).float().mean()

    def _loss_and_logits(self, predicted: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
        adapters = self.layout.unpack_several(self.normalization.denormalize(predicted.float()))
        with ExitStack() as stack:
            stack.enter_context(self.injection.injected(adapters))
            if self.checkpointed:  # a layer is computed again after this block, with its adapters
                again = partial(self.injection.injected, adapters)
                stack.enter_context(gradient_checkpointing(self.model, again))
            logits, tokens = answer_logits(self.model, rows)  # of all answer tokens
        each = len(rows.ids) // len(predicted)
        sequence = torch.arange(len(rows.ids), device=rows.ids.device)[:, None]
        has_label = rows.shifted_labels != IGNORED
        owner = (sequence // each).expand_as(rows.ids)[has_label]  # (answer tokens,)
        losses = token_losses(logits, tokens)
        sums = losses.new_zeros(len(predicted)).index_add_(0, owner, losses)
        return (sums / torch.bincount(owner, minlength=len(predicted))).mean(), logits


class Injection:
    """The modules of a base model that an adapter of a layout changes."""

    def __init__(self, model: nn.Module, layout: Layout, adapter_config: Mapping[str, Any]) -> None:
        """Raises LoragenError if the adapter is no plain LoRA on linear modules of the base."""
        self.modules: dict[str, nn.Module] = {}
        self.scaling: dict[str, float] = {}
        self.keys: dict[str, dict[str, str]] = {}  # path -> lora_A or lora_B -> key of the file
        modules = dict(model.named_modules())
        output = model.get_output_embeddings()  # type: ignore[operator]  # untyped in transformers
        for spec in layout.tensors:
            if spec.matrix not in ("lora_A", "lora_B") or len(spec.shape) != 2:
                raise LoragenError(
                    f"{spec.key}: only lora_A and lora_B of linear modules can be injected"
                )
            path = spec.path
            if path not in modules:
                raise LoragenError(f"the base has no module {path}, which the adapter changes")
            if modules[path] is output:
                raise LoragenError(f"{path}: adapters on the output layer are not trained through")
            self.modules[path] = modules[path]
            self.scaling[path] = module_scaling(adapter_config, path)
            self.keys.setdefault(path, {})[spec.matrix] = spec.key

    @contextmanager
    def injected(self, adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """Applies the adapters ``{file key: [adapters, rows, columns]}`` to the base in the block.

        A batch is cut into as many equal parts as there are adapters, in order. The forward pass
        raises LoragenError if a module does not see the whole batch, like the routed experts of a
        mixture.
        """
        with ExitStack() as hooks:
            for path, module in self.modules.items():
                a, b = (adapters[self.keys[path][matrix]] for matrix in ("lora_A", "lora_B"))
                hook = _AddLora(a, b, self.scaling[path])
                hooks.callback(module.register_forward_hook(hook).remove)
            yield


class _AddLora:
    """A forward hook that adds the scaled B A x of each part of the batch."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        self.a, self.b, self.scaling = a, b, scaling  # (D, r, in), (D, out, r)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.ndim != 3 or len(x) % len(self.a):
            raise LoragenError(
                f"a module receives {list(x.shape)}, which {len(self.a)} adapters do not "
                "share equally (a routed expert?): set training.objective=reconstruction"
            )
        parts = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a)  # (D, rows * T, in)
        low = torch.bmm(parts, self.a.transpose(1, 2))  # (D, rows * T, r)
        added = torch.bmm(low, self.b.transpose(1, 2))  # (D, rows * T, out)
        return output + (self.scaling * added).view_as(output).to(output)
