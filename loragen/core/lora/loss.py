"""The language-model loss on answer tokens, with the vocabulary projection at those only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen.core.lora.batch import IGNORED, PADDING, Batch, block_mask


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[answers, vocabulary]`` of every answer token, and the tokens ``[answers]``, in the
    order in which the batch holds them.

    The hidden states are narrowed on their way into the output layer, so whatever the model does
    to its logits after that (soft caps, scales) is kept. With a large vocabulary this is most of
    the work saved: an answer has 3 or 4 tokens, a row more than 100.
    """
    predicts = batch.targets != IGNORED  # (S, T)

    def narrow(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (S, T, H)
        return (hidden[predicts].unsqueeze(0), *inputs[1:])  # (1, answers, H)

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=batch.ids, use_cache=False, **_context(model, batch))
    finally:
        handle.remove()
    return output.logits.squeeze(0), batch.targets[predicts]


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """Cross entropy (nats) of every answer token, ``[answers]``, in float32 or better."""
    logits, tokens = answer_logits(model, batch)
    return token_losses(logits, tokens)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    wide = logits if logits.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, tokens, reduction="none")


def rows_right(logits: Tensor, batch: Batch) -> Tensor:
    """Whether each row's answer is what the model would write greedily, ``[rows]`` bool.

    With the true answer so far as context, the likeliest next token is right at every place
    exactly when greedy decoding gives that answer.
    """
    predicts = batch.targets != IGNORED
    sequence = torch.arange(len(batch.segments), device=batch.segments.device)[:, None]
    owner = (sequence * (batch.segments.max() + 1) + batch.segments)[predicts]  # (answers,)
    _, row = torch.unique(owner, return_inverse=True)
    hits = logits.argmax(-1) == batch.targets[predicts]
    right = torch.ones(int(row.max()) + 1, dtype=torch.bool, device=hits.device)
    return right.index_put((row[~hits],), torch.zeros_like(row[~hits], dtype=torch.bool))


def _context(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What each token sees: with one row a sequence, a plain padding mask says it."""
    if not batch.packed:
        return {"attention_mask": (batch.segments != PADDING).long()}
    mask = block_mask(batch.segments)
    if model.config._attn_implementation != "sdpa":  # the others add the mask to the scores
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )
    return {"attention_mask": mask, "position_ids": batch.positions}
