"""Whether a base model may be fed packed batches: asked of the model itself, not of a table."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from loragen.core.data.tokenize import Example
from loragen.core.lora.batch import Batch, Cost, division, packed, padded
from loragen.core.lora.loss import answer_losses

log = logging.getLogger(__name__)

# Mean difference (nats) of the answer tokens' losses that rounding may make. Measured: 4e-7 in
# float32 and 2e-3 in bfloat16 where packing is right, 5e-2 and more where it is not. (Norms
# compute in float32 whatever the model is in.)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
ROUGH = 2e-2  # 16-bit arithmetic


def packing_cost(model: Any, examples: Sequence[Example], pad_id: int, rows: int) -> Cost | None:
    """What a packed batch of this model costs, or None where it cannot be packed.

    It can where the model takes a 4-D mask and restarted positions: the longest `rows` rows, as
    many as it is to train on at once, have to give the losses that they have alone. A model that
    does not costs one notice and trains on padded batches, slower and just as right.
    """
    cost = model_cost(model)
    reason = _objection(model, examples, pad_id, cost, rows)
    if reason is None:
        return cost
    log.info("rows are padded, not packed: this base model %s", reason)
    return None


def model_cost(model: Any) -> Cost:
    """Floating-point operations of one layer's forward pass, from its sizes."""
    config = model.config.get_text_config()
    embeddings = {id(p) for m in _embeddings(model) for p in m.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return Cost(token=2 * inner / config.num_hidden_layers, pair=4 * config.hidden_size)


@torch.no_grad()
def _objection(
    model: Any, examples: Sequence[Example], pad_id: int, cost: Cost, rows: int
) -> str | None:
    longest = sorted(examples, key=lambda item: -len(item.ids))[:rows]
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and len(longest[0].ids) > window:
        return f"has a sliding window of {window} tokens, and a row has {len(longest[0].ids)}"
    trial = longest if len(longest) > 1 else longest * 2  # one row alone sees no other
    in_order = [trial[index] for one in division(trial, cost)[1] for index in one]
    modes = {module: module.training for module in model.modules()}  # a base keeps its eval mode
    model.eval()
    try:
        alone = answer_losses(model, padded(in_order, pad_id).to(model.device))
        together = _losses_together(model, packed(trial, pad_id, cost).to(model.device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(together, Exception):
        return f"refuses a 4-D attention mask ({type(together).__name__})"
    # nan, too, is no equality
    if not (alone - together).abs().mean() <= TOLERANCE.get(model.dtype, ROUGH):
        return "gives other losses under a 4-D attention mask"
    return None


def _losses_together(model: Any, batch: Batch) -> torch.Tensor | Exception:
    try:
        return answer_losses(model, batch)
    except Exception as error:  # noqa: BLE001  # a stranger's forward may raise anything
        return error


def _embeddings(model: Any) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in both if module is not None]
