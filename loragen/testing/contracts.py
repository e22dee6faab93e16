"""The checks of the contracts. Torch and Lightning are imported only when a check is called."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from loragen.core.protocols import (
    Metric,
    RunInfo,
    RunLogger,
    StartsFromSamples,
    Status,
    SupportSet,
    TokenGrid,
    Transfers,
)

if TYPE_CHECKING:
    from torch import Tensor

    Decode = Callable[[Tensor, Tensor], Tensor]
    "``condition [batch, prompts, positions, dim]``, its mask -> ``[batch, tokens, token_dim]``."

TOLERANCE = 1e-5  # padding changes the order of sums, and with it the last digits


def validated_options(cls: Any, options: dict[str, Any]) -> BaseModel:
    """Returns the options as a Config, which has to document its fields, reject unknown ones, and
    survive a round trip through plain data."""
    model: type[BaseModel] = cls.Config
    name = f"{cls.__name__}.Config"
    for field, info in model.model_fields.items():
        assert info.description, f"{name}.{field} has no description (its meaning and unit)"
    config = model.model_validate(options)
    again = model.model_validate(config.model_dump(mode="json"))
    assert again == config, f"{name} does not survive model_dump(mode='json'): {again!r}"
    try:
        model.model_validate({**options, "no_such_option": 1})
    except ValidationError:
        return config
    raise AssertionError(f'{name} accepts unknown options; declare it with extra="forbid"')


def built(cls: Any, *arguments: Any) -> Any:
    """Returns an instance in eval mode, which has to be an `nn.Module`."""
    import torch

    module = cls(*arguments)
    assert isinstance(module, torch.nn.Module), f"{cls.__name__} is not an nn.Module"
    return module.eval()


def trainable(module: Any) -> dict[str, Tensor]:
    """Returns the parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def disturb(parameters: Iterable[Tensor]) -> None:
    """Changes parameters a little, as training would, since zero-initialised ones hide errors."""
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


def saved_and_loaded(module: Any) -> dict[str, Tensor]:
    """Returns the module's state dict after a round trip through a file."""
    import torch

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference; infinity if the shapes differ."""
    return float((a - b).detach().abs().max()) if a.shape == b.shape else math.inf


# ---------------------------------------------------------------------------- decoders

CONDITION_DIM, POSITIONS = 12, 2
DATASETS = 6
FIT_TOLERANCE = 1e-4  # of the largest value: a fitted decoder sums in another order


def check_decoder(cls: Any, **options: Any) -> None:
    """Checks that a decoder is an `nn.Module` from a condition to the tokens of an adapter.

    `[batch, prompts, positions, dim]` and a boolean mask give finite `[batch, tokens, token_dim]`
    for 1, 3 and 40 prompts. Masked values, and padding under the mask, change nothing; in eval mode
    the output is deterministic, and that of an item does not depend on the rest of its batch.
    Gradients reach every trainable parameter and the condition. The state dict, saved and loaded
    with `weights_only=True`, gives an equal decoder.

    A decoder that combines collected adapters has to keep the promises of `Transfers` too; it is
    fitted to a few before the checks above. For a support set of one dataset or of several,
    `predict` keeps the promises of the output, and its gradients reach every trainable parameter.
    What is left out changes nothing, neither its adapter nor its prompts. After `fit`, which
    forgets earlier calls, the decoder itself gives what `predict` gave and still gives, and so does
    a decoder with the loaded state dict; its coefficients are finite `[batch, N]`.

    Raises AssertionError naming the promise that is broken.
    """
    import torch

    torch.manual_seed(0)
    config = validated_options(cls, options)
    transfers = hasattr(cls, "use_adapters")
    if transfers:
        promised = [name for name in vars(Transfers) if not name.startswith("_")]
        missing = [name for name in promised if not hasattr(cls, name)]
        assert not missing, f"{cls.__name__} has use_adapters, but no {', '.join(missing)}"
    decoder, fresh = (_ready(cls, config, ExampleAdapters()) for _ in range(2))
    disturb(decoder.parameters())
    if transfers:
        decoder.fit(_one_by_one(*example_conditions(DATASETS, 3, seed=1)))
    _check_output(decoder, "output")
    _check_state_dict(decoder, fresh)
    trained = trainable(decoder)
    assert trained, "there is no trainable parameter"
    condition, mask = example_conditions(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    _check_gradients(output, "output", trained)
    assert condition.grad is not None and condition.grad.any(), "the output ignores the condition"
    assert condition.grad.isfinite().all(), "the gradient of the condition is not finite"
    if transfers:
        _check_transfer(cls, config)


def grid(layers: int = 2, modules: int = 2, positions: int = 3, token_dim: int = 8) -> TokenGrid:
    """Returns a small adapter: `positions` tokens for lora_A and lora_B of each module."""
    import numpy as np

    axes = [a.reshape(-1).astype(np.int64) for a in np.indices((layers, modules, 2, positions))]
    return TokenGrid(axes[0].size, token_dim, *axes)


def example_conditions(batch: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns conditions, and a mask that hides some positions and one of several prompts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(batch, prompts, POSITIONS, CONDITION_DIM, generator=generator)
    mask = torch.ones(batch, prompts, POSITIONS, dtype=torch.bool)
    mask[:, ::2, 1:] = False
    if prompts > 1:
        mask[0, -1] = False
    return condition, mask


class ExampleAdapters:
    """One adapter of each dataset, with the protocols `Samples` and `CollectedAdapters`."""

    def __init__(self, noisy: Sequence[int] = ()) -> None:
        """The adapters of the datasets in `noisy` are others than in any other instance."""
        import torch

        generator = torch.Generator().manual_seed(0)
        self.shape = (DATASETS, grid().tokens, grid().token_dim)
        self._values = torch.randn(self.shape, generator=generator)
        for index in noisy:
            self._values[index] = torch.randn(self.shape[1:])

    def __getitem__(self, tokens: slice) -> Tensor:
        return self._values[:, tokens]

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        return self._values[list(datasets), tokens]


def _ready(cls: Any, config: Any, adapters: ExampleAdapters) -> Any:
    """Returns a decoder as a training prepares it before the first step."""
    decoder = built(cls, config, CONDITION_DIM, grid())
    if isinstance(decoder, Transfers):
        decoder.use_adapters(adapters)
    if isinstance(decoder, StartsFromSamples):
        decoder.start_from(adapters)
    return decoder


def _one_by_one(condition: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((condition[i : i + 1], mask[i : i + 1]) for i in range(len(condition)))


def _check_output(decode: Decode, what: str) -> None:
    """Checks the promises of an output; `what` names it in messages."""
    import torch

    expected = (2, grid().tokens, grid().token_dim)
    for prompts in (1, 3, 40):
        condition, mask = example_conditions(2, prompts)
        given = decode(condition, mask)
        shape = tuple(given.shape)
        assert shape == expected, f"{what}: {prompts} prompts give {shape}, not {expected}"
        assert given.isfinite().all(), f"{what}: {prompts} prompts give values that are not finite"
        assert given.equal(decode(condition, mask)), f"{what}: not deterministic in eval mode"

    condition, mask = example_conditions(2, 3)
    output = decode(condition, mask)
    noisy = torch.where(mask[..., None], condition, 3.0)
    assert largest_difference(decode(noisy, mask), output) <= TOLERANCE, (
        f"masked values change the {what}"
    )
    padded = torch.cat([condition, torch.full_like(condition, 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert largest_difference(decode(padded, padded_mask), output) <= TOLERANCE, (
        f"masked prompts appended to the condition change the {what}"
    )

    condition, mask = example_conditions(3, 3)
    together = decode(condition, mask)
    for item in range(3):
        alone = decode(condition[item : item + 1], mask[item : item + 1])
        difference = largest_difference(alone[0], together[item])
        assert difference <= TOLERANCE, f"{what}: an item depends on its batch: by {difference:.1e}"


def _check_state_dict(decoder: Any, fresh: Any) -> None:
    fresh.load_state_dict(saved_and_loaded(decoder))
    condition, mask = example_conditions(2, 3)
    assert decoder(condition, mask).equal(fresh(condition, mask)), (
        "a fresh decoder with the loaded state dict gives another output: something is not in it"
    )


def _check_gradients(given: Tensor, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks that gradients of `given` reach each of the tensors, and that one is not zero."""
    import torch

    assert given.requires_grad, f"{what}: it carries no gradient"
    torch.autograd.backward((given - 1.0).square().mean())
    for name, tensor in tensors.items():
        assert tensor.grad is not None, f"{what}: no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite"
    assert any(t.grad is not None and t.grad.any() for t in tensors.values()), (
        f"{what}: every gradient is zero"
    )


def _check_transfer(cls: Any, config: Any) -> None:
    """Calls the decoder in the order of a training."""
    import torch

    decoder = _ready(cls, config, ExampleAdapters())
    disturb(decoder.parameters())
    known, known_mask = example_conditions(DATASETS, 3, seed=1)

    def predict(
        condition: Tensor,
        mask: Tensor,
        by: Any = decoder,
        others: Tensor = known,
        datasets: int = DATASETS,
        without: int | None = None,
    ) -> Tensor:
        left_out = torch.zeros(len(condition), datasets, dtype=torch.bool)
        if without is not None:
            left_out[:, without] = True
        support = torch.arange(datasets)
        given = SupportSet(others[:datasets], known_mask[:datasets], support, left_out)
        predicted: Tensor = by.predict(condition, mask, given)
        return predicted

    for datasets in (1, DATASETS):
        decode = partial(predict, datasets=datasets)
        _check_output(decode, f"predict (support: {datasets} datasets)")
    condition, mask = example_conditions(3, 3)

    left_out = predict(condition, mask, without=2)
    assert not left_out.equal(predict(condition, mask)), "left_out changes nothing in predict"
    other = _ready(cls, config, ExampleAdapters(noisy=[2]))
    other.load_state_dict(decoder.state_dict())
    assert predict(condition, mask, by=other, without=2).equal(left_out), (
        "the adapter of a dataset that is left out changes what predict gives"
    )
    noisy = known.clone()
    noisy[2] = torch.randn_like(noisy[2])
    assert predict(condition, mask, others=noisy, without=2).equal(left_out), (
        "the prompts of a dataset that is left out change what predict gives"
    )

    decoder.train()
    _check_gradients(predict(*example_conditions(2, 3)), "predict", trainable(decoder))
    decoder.eval()

    with torch.no_grad():
        expected = predict(condition, mask)
        for conditions in (-known, known):  # a training fits the decoder many times
            decoder.fit(_one_by_one(conditions, known_mask))
        still, decoded = predict(condition, mask), decoder(condition, mask)
        shares = decoder.coefficients(condition, mask)
    tolerance = FIT_TOLERANCE * float(expected.abs().max())
    assert (off := largest_difference(still, expected)) <= tolerance, (
        f"fit changes what predict gives, and so what is trained: by {off:.1e}"
    )
    assert (off := largest_difference(decoded, expected)) <= tolerance, (
        f"after fit the decoder does not give what predict gave: off by {off:.1e}"
    )
    assert list(shares.shape) == [len(condition), DATASETS] and shares.isfinite().all(), (
        f"coefficients must be finite [{len(condition)}, {DATASETS}], not {list(shares.shape)}"
    )
    _check_state_dict(decoder, _ready(cls, config, ExampleAdapters()))


# ---------------------------------------------------------------------------- encoders

TEXTS = ["What is 2 + 3?", "Name a metal.", "Translate into French: the cat sleeps. " * 8]


def check_encoder(cls: Any, **options: Any) -> None:
    """Checks that an encoder is an `nn.Module` from texts to embeddings and a mask.

    Embeddings are finite floats `[prompts, positions, dim]`; the mask `[prompts, positions]` is
    boolean, with at least one position per text. Both can feed a trainable layer. The embedding of
    a text does not depend on the other texts. An empty list raises, or gives no embeddings.

    The fingerprint is a text, equal for equal weights. A frozen encoder has no trainable parameter.
    Otherwise gradients reach every trainable parameter, the fingerprint changes with them, and the
    state dict, saved and loaded with `weights_only=True`, gives an equal encoder.
    """
    import torch

    name = cls.__name__
    encoder, again = (built(cls, validated_options(cls, options)) for _ in range(2))
    embeddings, mask = encoder(TEXTS)
    shape = list(embeddings.shape)
    assert embeddings.ndim == 3 and shape[0] == len(TEXTS), (
        f"{name} must give [{len(TEXTS)}, positions, dim], not {shape}"
    )
    assert shape[2] == encoder.dim, f"{name}.dim is {encoder.dim}, its embeddings have {shape[2]}"
    assert embeddings.is_floating_point(), f"{name} gives {embeddings.dtype} embeddings"
    assert mask.dtype == torch.bool, f"{name} gives a {mask.dtype} mask; it must be boolean"
    assert list(mask.shape) == shape[:2], f"{name}'s mask is {list(mask.shape)}, not {shape[:2]}"
    assert mask.any(dim=1).all(), f"{name} masks a whole text"
    assert embeddings[mask].isfinite().all(), f"{name} gives embeddings that are not finite"
    assert not embeddings.is_inference(), (
        f"{name} gives inference tensors, which no trainable layer can use: clone() them"
    )
    for index, text in enumerate(TEXTS):
        alone, alone_mask = encoder([text])
        difference = largest_difference(alone[alone_mask], embeddings[index][mask[index]])
        assert difference <= TOLERANCE, (
            f"{name} embeds {text[:20]!r} differently beside other texts: by {difference:.1e}"
        )
    try:
        none, none_mask = encoder([])
    except Exception:  # noqa: BLE001  # an error of any class is fine
        pass
    else:
        assert len(none) == len(none_mask) == 0, f"{name} gives embeddings of no texts"

    fingerprint = encoder.fingerprint
    assert isinstance(fingerprint, str) and fingerprint, "fingerprint must be a non-empty text"
    assert again.fingerprint == fingerprint, "equal encoders must have equal fingerprints"
    trained = trainable(encoder)
    assert isinstance(encoder.frozen, bool), f"frozen must be True or False, not {encoder.frozen!r}"
    assert encoder.frozen == (not trained), (
        f"frozen is {encoder.frozen}, and {len(trained)} parameters require gradients"
    )
    torch.nn.Linear(encoder.dim, 1).to(embeddings)(embeddings).sum().backward()
    for parameter_name, parameter in trained.items():
        assert parameter.grad is not None, f"no gradient reaches {parameter_name}"
    if trained:
        disturb(trained.values())
        assert encoder.fingerprint != fingerprint, "the fingerprint does not change in training"
        again.load_state_dict(saved_and_loaded(encoder))
        assert again.fingerprint == encoder.fingerprint, (
            "a loaded state dict gives another fingerprint"
        )
        assert encoder(TEXTS)[0].equal(again(TEXTS)[0]), (
            "a loaded state dict gives other embeddings: something is missing from it"
        )


# ---------------------------------------------------------------------------- loggers


def check_logger(cls: Any, tmp_path: Path, **options: Any) -> None:
    """Checks that a logger opens a `lightning.pytorch` Logger, and closes it with any status.

    It writes below the run directory only, not into the working directory. Its `run_id` is a text
    or None, does not change at close, and differs between runs of one process. The same holds for a
    resumed run, in the directory of an earlier run and with its id and steps.
    """
    (tmp_path / "work").mkdir()
    ids: list[str] = []
    with chdir(tmp_path / "work"):
        for status in get_args(Status):
            run_id = _log_one_run(cls, options, tmp_path / status, status)
            ids += [run_id] if run_id else []
        assert len(set(ids)) == len(ids), f"{cls.__name__} gives two runs one run_id: {ids}"
        first = ids[0] if ids else None
        _log_one_run(cls, options, tmp_path / "success", "success", first, 1)


def _log_one_run(
    cls: Any, options: dict[str, Any], directory: Path, status: Status, *resumed: Any
) -> str | None:
    """Returns the `run_id`; `resumed` are the id and the steps of a run that is resumed."""
    from lightning.pytorch.loggers import Logger

    directory.mkdir(exist_ok=True)
    before = _files(directory.parent)
    config = {"seed": 42, "data": {"dataset": "check"}}
    plugin: RunLogger = cls(validated_options(cls, options))
    run = RunInfo(directory, directory.name, "loragen-check", config, *resumed)
    logger = plugin.open(run)
    assert isinstance(logger, Logger), f"{cls.__name__}.open must give a lightning.pytorch Logger"
    for step in (run.resume_step + 1, run.resume_step + 2):
        logger.log_metrics({"train/loss": 1.0 / step, "lr": 1e-4}, step=step)
    run_id = plugin.run_id
    assert run_id is None or (isinstance(run_id, str) and run_id), f"run_id is {run_id!r}"
    logger.finalize("success" if status == "success" else "failed")  # in the order of a training
    plugin.close(status)
    assert plugin.run_id == run_id, f"{cls.__name__}.run_id changes at close"
    changed = {p for p, state in _files(directory.parent).items() if before.get(p) != state}
    strays = sorted(str(p) for p in changed if not p.is_relative_to(directory))
    assert not strays, f"{cls.__name__} writes outside the run directory: {strays}"
    return run_id


def _files(directory: Path) -> dict[Path, tuple[int, int]]:
    """Returns size and time of every file, which change when it is written to."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


# ---------------------------------------------------------------------------- objectives


def check_objective(cls: Any, data: Any = None, network: Any = None, **options: Any) -> None:
    """Checks that an objective makes batches, a loss and validation metrics.

    `data` is a `TrainingData`, or a stand-in with what the objective reads from it; by default, an
    `ExampleTraining`. `network` maps a condition and its mask to adapters; by default, it is one
    linear layer. Steps, learning rate and batch size are positive. A
    batch depends on its index alone, not on the batches before it, and two processes share it. The
    loss is a finite scalar whose gradient reaches a trainable parameter; metrics are detached, and
    `loss` is among them. `validate` gives finite metrics, `metric.name` among them.
    """
    import torch

    name, config = cls.__name__, validated_options(cls, options)
    data = data or ExampleTraining()
    network = network or example_network()
    objective, again = (cls(config, data) for _ in range(2))
    for attribute in ("steps", "learning_rate", "batch_size"):
        value = getattr(objective, attribute)
        assert value > 0, f"{name}.{attribute} is {value}; it must be positive"
    assert isinstance(objective.metric, Metric), f"{name}.metric is {objective.metric!r}, no Metric"

    batches, others = objective.batches(0, 1), again.batches(0, 1)
    for index in (3, 0, 1):
        one, other = batches[index], others[index]
        for part in ("condition", "mask", "tokens"):
            assert getattr(one, part).equal(getattr(other, part)), (
                f"{name}: batch {index} has another {part} the second time"
            )
        others[index + 1]
    batch = batches[0]
    size = len(batch.tokens)
    assert size == objective.batch_size, (
        f"{name}.batch_size is {objective.batch_size}, and a batch has {size} pairs"
    )
    if size % 2 == 0:
        shares = [len(objective.batches(process, 2)[0].tokens) for process in range(2)]
        assert shares == [size // 2] * 2, (
            f"{name}: two processes share a batch of {size} pairs as {shares}"
        )

    loss, metrics = objective.loss(network, batch)
    assert loss.ndim == 0 and loss.isfinite(), f"{name}.loss gives {loss}, not a finite scalar"
    assert loss.requires_grad, f"{name}.loss carries no gradient"
    assert "loss" in metrics, f"{name}.loss has no 'loss' among its metrics: {sorted(metrics)}"
    attached = [key for key, value in metrics.items() if value.requires_grad]
    assert not attached, f"{name}.loss gives metrics with gradients: {attached}; detach() them"
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable(network).values()), (
        f"{name}: the gradient of the loss reaches no parameter of the network"
    )

    objective.finalize(network)
    with torch.no_grad():
        found = objective.validate(network, batch)
    assert objective.metric.name in found, (
        f"{name}.validate gives {sorted(found)}, without its metric '{objective.metric.name}'"
    )
    infinite = [key for key, value in found.items() if not torch.as_tensor(value).isfinite()]
    assert not infinite, f"{name}.validate gives values that are not finite: {infinite}"


class ExampleBatch(NamedTuple):
    """Conditions, each with an adapter."""

    condition: Tensor
    mask: Tensor
    tokens: Tensor


class ExampleTraining:
    """What most objectives read of a `TrainingData`, with random adapters of the grid `grid()`."""

    def __init__(self, batch_size: int = 4) -> None:
        places = grid()
        self.config = SimpleNamespace(seed=42, data=SimpleNamespace(batch_size=batch_size))
        self.layout = SimpleNamespace(tokens=places.tokens, token_dim=places.token_dim)
        self.normalization = ExampleNormalization()

    def pairs(self, process_index: int = 0, num_processes: int = 1) -> ExamplePairs:
        return ExamplePairs(self, process_index, num_processes)


class ExampleNormalization:
    """A `Normalization` of mean 0 and scale 1/2."""

    def normalize(self, tokens: Tensor) -> Tensor:
        return 2 * tokens

    def denormalize(self, normalized: Tensor) -> Tensor:
        return normalized / 2

    def to(self, device: Any) -> ExampleNormalization:  # noqa: ARG002  # it holds no tensors
        return self


class ExamplePairs:
    """Item k is a process's share of micro-batch k, a pure function of both."""

    def __init__(self, data: ExampleTraining, process_index: int, num_processes: int) -> None:
        self.data, self.process_index, self.num_processes = data, process_index, num_processes

    def __getitem__(self, k: int) -> ExampleBatch:
        import torch

        size, layout = self.data.config.data.batch_size, self.data.layout
        generator = torch.Generator().manual_seed(k)
        tokens = torch.randn(size, layout.tokens, layout.token_dim, generator=generator)
        whole = (*example_conditions(size, 3, seed=k), tokens)
        return ExampleBatch(*(part[self.process_index :: self.num_processes] for part in whole))


def example_network() -> Any:
    """Returns an `nn.Module` from a condition and its mask to adapters of the grid `grid()`."""
    import torch

    places = grid()

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(CONDITION_DIM, places.tokens * places.token_dim)

        def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
            read = torch.where(mask[..., None], condition, 0.0).mean(dim=(1, 2))
            written: Tensor = self.linear(read).view(-1, places.tokens, places.token_dim)
            return written

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Linear()


# ---------------------------------------------------------------------------- schedules


def check_schedule(cls: Any, **options: Any) -> None:
    """Checks that a schedule is a pure function of (step, total steps).

    A second call and a new instance return the same rate, so that a resumed run has the same rates.
    For runs of 1 to 1,000 steps, every learning rate is positive and finite, and stages are counted
    from 1 and never decrease. A rate holds plain numbers and can be pickled into a checkpoint.
    """
    config = validated_options(cls, options)
    schedule = cls(config)
    for total in (1, 2, 3, 10, 125, 1000):
        stage = 1
        for step in range(1, total + 1):
            where = f"{cls.__name__}(step={step}, total_steps={total})"
            rate = schedule(step, total)
            has_both = hasattr(rate, "learning_rate") and hasattr(rate, "stage")
            assert has_both, f"{where} must give a Rate(learning_rate, stage), not {rate!r}"
            value = rate.learning_rate
            plain = type(value) in (int, float) and type(rate.stage) is int
            assert plain, f"{where} must give plain numbers, not {rate!r}"
            assert math.isfinite(value) and value > 0, f"{where} gives {value}"
            assert rate.stage >= 1, f"{where} gives stage {rate.stage}; stages count from 1"
            assert pickle.loads(pickle.dumps(rate)) == rate, f"{where} does not survive pickling"
            assert rate.stage >= stage, f"{where} goes back from stage {stage} to {rate.stage}"
            stage = rate.stage
            assert schedule(step, total) == rate, f"{where} differs when called again"
            assert cls(config)(step, total) == rate, f"{where} differs on a fresh instance"
