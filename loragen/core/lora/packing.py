"""Whether a base model may be fed packed batches: asked of the model itself, not of a table."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from loragen.core.data.tokenize import Example
from loragen.core.lora.batch import Batch, Cost, packed, padded
from loragen.core.lora.loss import answer_losses

log = logging.getLogger(__name__)

TRIAL_ROWS = 3
# Equal in exact arithmetic; what rounding may make of it, relative to the loss of a row.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
ROUGH = 5e-2  # 16-bit arithmetic


def packing_cost(model: Any, examples: Sequence[Example], pad_id: int) -> Cost | None:
    """What a packed batch of this model costs, or None where it cannot be packed.

    It can where the model takes a 4-D mask and restarted positions: a few short rows have to give
    the losses that they have alone. A model that does not costs one notice and trains on padded
    batches, slower and just as right.
    """
    reason = _objection(model, examples, pad_id)
    if reason is None:
        return model_cost(model)
    log.info("rows are padded, not packed: this base model %s", reason)
    return None


def model_cost(model: Any) -> Cost:
    """Floating-point operations of one layer's forward pass, from its sizes."""
    config = model.config.get_text_config()
    embeddings = {id(p) for m in _embeddings(model) for p in m.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return Cost(token=2 * inner / config.num_hidden_layers, pair=4 * config.hidden_size)


@torch.no_grad()
def _objection(model: Any, examples: Sequence[Example], pad_id: int) -> str | None:
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(len(item.ids) for item in examples)
    if window and longest > window:
        return f"has a sliding window of {window} tokens, and a row has {longest}"
    trial = sorted(examples, key=lambda item: len(item.ids))[:TRIAL_ROWS]
    was_training = model.training
    model.eval()
    try:
        one_sequence = Cost(token=1.0, pair=0.0)
        alone = _sorted_losses(model, padded(trial, pad_id))
        together = _sorted_losses(model, packed(trial, pad_id, one_sequence))
    except Exception as error:  # noqa: BLE001  # a stranger's forward may raise anything
        return f"refuses a 4-D attention mask ({type(error).__name__})"
    finally:
        model.train(was_training)
    tolerance = TOLERANCE.get(model.dtype, ROUGH)
    if not torch.allclose(alone, together, rtol=tolerance, atol=tolerance):
        return "gives other losses under a 4-D attention mask"
    return None


def _sorted_losses(model: Any, batch: Batch) -> torch.Tensor:
    """The answer tokens' losses, ``[answers]``; sorted, as packing changes the order of rows."""
    return answer_losses(model, batch.to(model.device)).sort().values


def _embeddings(model: Any) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in both if module is not None]
