"""The promises of `loragen.core.protocols` as checks. A plugin's author calls them from pytest:

    from loragen.testing import check_schedule
    from my_package.linear import Linear

    def test_contract():
        check_schedule(Linear, final_share=0.1)

Keyword arguments are the options of the plugin's Config. A broken promise is an AssertionError that
names it. The built-in plugins pass the same checks.
"""

from __future__ import annotations

import io
import math
import pickle
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from loragen.core.protocols import Rate, RunInfo, RunLogger, Status, TokenGrid

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5  # padding changes the order of sums, and so the last digits
CONDITION_DIM, POSITIONS = 12, 2
TEXTS = ("What is 2 + 3?", "Name a metal.", "Translate into French: the cat sleeps. " * 8)


def check_schedule(cls: Any, **options: Any) -> None:
    """A schedule is a pure function of (step, total steps).

    It gives the same answer twice and from a fresh instance, so that a resumed run follows the same
    rates; every rate of steps 1 to total is a positive finite number, in runs of one step too;
    stages are counted from 1 and never go back; the answer is plain numbers, fit for a checkpoint.
    """
    config = _config(cls, options)
    schedule = cls(config)
    for total in (1, 2, 3, 10, 125, 1000):
        stage = 1
        for step in range(1, total + 1):
            where = f"{cls.__name__}(step={step}, total_steps={total})"
            rate = schedule(step, total)
            _check_rate(rate, where)
            assert rate.stage >= stage, f"{where} goes back from stage {stage} to {rate.stage}"
            stage = rate.stage
            assert schedule(step, total) == rate, f"{where} answers differently the second time"
            assert cls(config)(step, total) == rate, f"{where} differs on a fresh instance"


def check_logger(cls: Any, tmp_path: Path, **options: Any) -> None:
    """A logger opens a `lightning.pytorch` Logger for a run and closes it with any status.

    It writes below the run directory only, nothing into the working directory; its `run_id` is text
    or None, and stays after the close; a second run in the same process is a run of its own. The
    same holds of one that goes on: in the directory of an earlier run, told its id and steps.
    """
    work = tmp_path / "work"
    work.mkdir()
    ids: list[str] = []
    with chdir(work):
        for status in get_args(Status):
            run_id = _log_one_run(cls, options, tmp_path / status, status)
            ids += [run_id] if run_id else []
        assert len(set(ids)) == len(ids), f"{cls.__name__} gives two runs one run_id: {ids}"
        first = ids[0] if ids else None
        _log_one_run(cls, options, tmp_path / "success", "success", first, 1)


def check_encoder(cls: Any, **options: Any) -> None:
    """An encoder is an `nn.Module` from texts to embeddings and a mask.

    Embeddings are `[prompts, positions, dim]` in floating point, the mask `[prompts, positions]` is
    boolean with at least one position per text; both may feed a trainable layer. The embedding of a
    text does not depend on the texts beside it. No texts are refused, or give no embeddings. The
    fingerprint is text, and equal for equal weights. A frozen encoder has nothing to train;
    gradients reach every parameter of one that trains, and its state dict, saved and loaded with
    `weights_only=True`, gives an equal encoder with an equal fingerprint.
    """
    import torch

    encoder, again = (_module(cls, _config(cls, options)) for _ in range(2))
    embeddings, mask = encoder(list(TEXTS))
    _check_embeddings(cls.__name__, embeddings, mask, len(TEXTS), encoder.dim)
    torch.nn.Linear(encoder.dim, 1).to(embeddings)(embeddings).sum().backward()
    for index, text in enumerate(TEXTS):
        alone, alone_mask = encoder([text])
        difference = _distance(alone[alone_mask], embeddings[index][mask[index]])
        assert difference <= TOLERANCE, (
            f"{cls.__name__} embeds {text[:20]!r} differently beside others: by {difference:.1e}"
        )
    fingerprint = encoder.fingerprint
    assert isinstance(fingerprint, str) and fingerprint, "fingerprint must be a non-empty text"
    assert again.fingerprint == fingerprint, "equal encoders must have equal fingerprints"
    _check_no_texts(encoder)
    _check_training(encoder, again)


def check_decoder(cls: Any, **options: Any) -> None:
    """A decoder is an `nn.Module` from a condition to the tokens of an adapter.

    `[batch, prompts, positions, dim]` and a boolean mask become finite `[batch, tokens, token_dim]`
    for 1, 3 and 40 prompts. What is masked changes nothing, neither its values nor how much of it
    there is; in eval mode the answer is deterministic and an item's does not depend on the batch
    beside it. Gradients reach every trainable parameter and the condition. The state dict, saved
    and loaded with `weights_only=True`, gives an equal decoder.
    """
    import torch

    torch.manual_seed(0)
    config = _config(cls, options)
    decoder, fresh = (_module(cls, config, CONDITION_DIM, grid()) for _ in range(2))
    with torch.no_grad():  # a zero-initialised output would answer every check with zeros
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _check_shapes(decoder)
    _check_mask(decoder)
    _check_batch_independence(decoder)
    _check_state_dict(decoder, fresh)
    _check_gradients(decoder)


def grid(layers: int = 2, modules: int = 2, positions: int = 3, token_dim: int = 8) -> TokenGrid:
    """A small adapter: `positions` tokens for lora_A and lora_B of each module of each layer."""
    import numpy as np

    axes = [a.reshape(-1).astype(np.int64) for a in np.indices((layers, modules, 2, positions))]
    return TokenGrid(axes[0].size, token_dim, *axes)


def _config(cls: Any, options: dict[str, Any]) -> BaseModel:
    """The validated options. Config refuses unknown ones, documents its own, and is plain data."""
    model: type[BaseModel] = cls.Config
    name = f"{cls.__name__}.Config"
    for field, info in model.model_fields.items():
        assert info.description, f"{name}.{field} has no description (what it means, and its unit)"
    config = model.model_validate(options)
    again = model.model_validate(config.model_dump(mode="json"))
    assert again == config, f"{name} does not survive model_dump(mode='json'): {again!r}"
    try:
        model.model_validate({**options, "no_such_option": 1})
    except ValidationError:
        return config
    raise AssertionError(f'{name} accepts unknown options; declare it with extra="forbid"')


def _module(cls: Any, *arguments: Any) -> Any:
    import torch

    module = cls(*arguments)
    assert isinstance(module, torch.nn.Module), f"{cls.__name__} is not an nn.Module"
    return module.eval()


def _check_rate(rate: Rate, where: str) -> None:
    learning_rate, stage = rate.learning_rate, rate.stage
    plain = type(learning_rate) in (int, float) and type(stage) is int
    assert plain, f"{where} must give plain numbers, not {rate!r}"
    assert math.isfinite(learning_rate) and learning_rate > 0, f"{where} gives {learning_rate}"
    assert stage >= 1, f"{where} is in stage {stage}; stages are counted from 1"
    assert pickle.loads(pickle.dumps(rate)) == rate, f"{where} does not survive pickling"


def _log_one_run(
    cls: Any, options: dict[str, Any], place: Path, status: Status, *resumed: Any
) -> str | None:
    """Its `run_id`. `resumed` is the id and the steps of the run that is continued."""
    from lightning.pytorch.loggers import Logger

    place.mkdir(exist_ok=True)
    before = _files(place.parent)
    config = {"seed": 42, "data": {"dataset": "check"}}
    plugin: RunLogger = cls(_config(cls, options))
    logger = plugin.open(run := RunInfo(place, place.name, "loragen-check", config, *resumed))
    assert isinstance(logger, Logger), f"{cls.__name__}.open must give a lightning.pytorch Logger"
    for step in (run.resume_step + 1, run.resume_step + 2):
        logger.log_metrics({"train/loss": 1.0 / step, "lr": 1e-4}, step=step)
    run_id = plugin.run_id
    assert run_id is None or (isinstance(run_id, str) and run_id), f"run_id is {run_id!r}"
    logger.finalize("success" if status == "success" else "failed")  # as in training, first
    plugin.close(status)
    assert plugin.run_id == run_id, f"{cls.__name__}.run_id changes at close"
    changed = {p for p, what in _files(place.parent).items() if before.get(p) != what}
    strays = sorted(str(p) for p in changed if not p.is_relative_to(place))
    assert not strays, f"{cls.__name__} writes outside the run directory: {strays}"
    return run_id


def _files(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file, with what changes when it is written to."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _check_embeddings(name: str, embeddings: Tensor, mask: Tensor, prompts: int, dim: int) -> None:
    import torch

    assert embeddings.ndim == 3 and embeddings.shape[0] == prompts, (
        f"{name} must give [{prompts}, positions, dim], not {list(embeddings.shape)}"
    )
    assert embeddings.shape[2] == dim, f"{name}.dim is {dim}, its embeddings {embeddings.shape[2]}"
    assert embeddings.is_floating_point(), f"{name} gives {embeddings.dtype} embeddings"
    assert mask.dtype == torch.bool, f"{name} gives a {mask.dtype} mask; it must be boolean"
    assert mask.shape == embeddings.shape[:2], (
        f"{name}'s mask is {list(mask.shape)} for embeddings {list(embeddings.shape)}"
    )
    assert mask.any(dim=1).all(), f"{name} masks a whole text"
    assert embeddings[mask].isfinite().all(), f"{name} gives embeddings that are not finite"
    assert not embeddings.is_inference(), (
        f"{name} gives inference tensors, which no trainable layer can use: clone() them"
    )


def _check_training(encoder: Any, again: Any) -> None:
    import torch

    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert isinstance(encoder.frozen, bool), f"frozen must be True or False, not {encoder.frozen!r}"
    assert encoder.frozen == (not trainable), (
        f"frozen is {encoder.frozen}, and {len(trainable)} parameters require gradients"
    )
    for name, parameter in trainable.items():
        assert parameter.grad is not None, f"no gradient reaches {name}"
    if not trainable:
        return
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = encoder.fingerprint
    assert again.fingerprint != before, "the fingerprint does not change with the trained weights"
    again.load_state_dict(_saved_and_loaded(encoder))
    assert again.fingerprint == before, "a loaded state dict gives another fingerprint"
    assert encoder(list(TEXTS))[0].equal(again(list(TEXTS))[0]), (
        "a fresh encoder with the loaded state dict embeds differently: something is not in it"
    )


def _saved_and_loaded(module: Any) -> dict[str, Tensor]:
    import torch

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def _check_no_texts(encoder: Any) -> None:
    try:
        embeddings, mask = encoder([])
    except Exception:  # noqa: BLE001  # refusing is as good, however it is done
        return
    assert embeddings.shape[0] == mask.shape[0] == 0, "no texts must give no embeddings"


def _condition(batch: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A condition and a mask that leaves a position of every prompt and, of several, a prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(batch, prompts, POSITIONS, CONDITION_DIM, generator=generator)
    mask = torch.ones(batch, prompts, POSITIONS, dtype=torch.bool)
    mask[:, ::2, 1:] = False
    if prompts > 1:
        mask[0, -1] = False
    return condition, mask


def _check_shapes(decoder: Any) -> None:
    expected = (2, grid().tokens, grid().token_dim)
    for prompts in (1, 3, 40):
        condition, mask = _condition(2, prompts)
        output = decoder(condition, mask)
        shape = tuple(output.shape)
        assert shape == expected, f"{prompts} prompts give {shape}, not {expected}"
        assert output.isfinite().all(), f"{prompts} prompts give values that are not finite"
        assert output.equal(decoder(condition, mask)), "not deterministic in eval mode"


def _check_mask(decoder: Any) -> None:
    import torch

    condition, mask = _condition(2, 3)
    expected = decoder(condition, mask)
    noisy = torch.where(mask[..., None], condition, 3.0)
    assert _distance(decoder(noisy, mask), expected) <= TOLERANCE, "masked values change the output"
    padded = torch.cat([condition, torch.full_like(condition, 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert _distance(decoder(padded, padded_mask), expected) <= TOLERANCE, (
        "masked prompts appended to the condition change the output"
    )


def _check_batch_independence(decoder: Any) -> None:
    condition, mask = _condition(3, 3)
    together = decoder(condition, mask)
    for item in range(3):
        alone = decoder(condition[item : item + 1], mask[item : item + 1])
        difference = _distance(alone[0], together[item])
        assert difference <= TOLERANCE, f"an item depends on its batch: by {difference:.1e}"


def _check_state_dict(decoder: Any, fresh: Any) -> None:
    fresh.load_state_dict(_saved_and_loaded(decoder))
    condition, mask = _condition(2, 3)
    assert decoder(condition, mask).equal(fresh(condition, mask)), (
        "a fresh decoder with the loaded state dict gives another output: something is not in it"
    )


def _check_gradients(decoder: Any) -> None:
    import torch

    condition, mask = _condition(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    (output - torch.ones_like(output)).square().mean().backward()
    trainable = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    assert trainable, "there is no trainable parameter"
    for name, tensor in {**trainable, "the condition": condition}.items():
        assert tensor.grad is not None, f"no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert any(parameter.grad.any() for parameter in trainable.values()), "every gradient is zero"
    assert condition.grad is not None and condition.grad.any(), "the output ignores the condition"


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where the shapes already differ."""
    return float((a - b).detach().abs().max()) if a.shape == b.shape else math.inf
