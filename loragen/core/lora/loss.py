"""The language-model loss on answer tokens, with the vocabulary projection at those only."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from loragen.core.data.tokenize import IGNORED, Batch


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[answers, vocabulary]`` of every answer token, and the tokens ``[answers]``, row by
    row.

    The hidden states are narrowed on their way into the output layer, so whatever the model does
    to its logits after that (soft caps, scales) is kept. With a large vocabulary this is most of
    the work saved: an answer has 3 or 4 tokens, a row more than 100.
    """
    predicts = batch.labels[:, 1:] != IGNORED  # (B, T-1): position t predicts token t+1

    def narrow(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (B, T, H)
        return (hidden[:, :-1][predicts].unsqueeze(0), *inputs[1:])  # (1, answers, H)

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    finally:
        handle.remove()
    return output.logits.squeeze(0), batch.labels[:, 1:][predicts]


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """Cross entropy (nats) of every answer token, ``[answers]``, in float32 or better."""
    logits, tokens = answer_logits(model, batch)
    wide = logits if logits.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, tokens, reduction="none")
