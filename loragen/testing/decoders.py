"""The promise of a decoder. Imports torch only when called."""

from typing import Any

from loragen.testing._common import built, disturb, trainable, validated
from loragen.testing._decoding import (
    CONDITION_DIM,
    check_answer,
    check_gradients,
    check_state_dict,
    conditions,
    grid,
)
from loragen.testing._transfer import check_transfer


def check_decoder(cls: Any, **options: Any) -> None:
    """A decoder is an `nn.Module` from a condition to the tokens of an adapter.

    `[batch, prompts, positions, dim]` and a boolean mask become finite `[batch, tokens, token_dim]`
    for 1, 3 and 40 prompts. What is masked changes nothing, neither its values nor how much of it
    there is; in eval mode the answer is deterministic and an item's does not depend on the batch
    beside it. Gradients reach every trainable parameter and the condition. The state dict, saved
    and loaded with `weights_only=True`, gives an equal decoder.

    One that can transfer with these options keeps the promises of `Transfers` too. Its coordinates
    are finite `[samples, R]`, without gradients; its features are `[batch, F]`, and what is said of
    the output above holds of them. From one other dataset as from several, `transferred` gives
    finite `[batch, tokens, token_dim]`, whose gradients reach whatever `train_transfer_only` leaves
    trainable. After `settle`, on these datasets and no earlier ones, the decoder itself writes as
    `transferred` did, and still does; what was settled is in the state dict.
    """
    import torch

    torch.manual_seed(0)
    config = validated(cls, options)
    decoder, fresh = (built(cls, config, CONDITION_DIM, grid()) for _ in range(2))
    disturb(decoder.parameters())
    check_answer(decoder, "output", (2, grid().tokens, grid().token_dim))
    check_state_dict(decoder, fresh)
    _check_training(decoder)
    check_transfer(cls, config)


def _check_training(decoder: Any) -> None:
    trained = trainable(decoder)
    assert trained, "there is no trainable parameter"
    condition, mask = conditions(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    check_gradients(output, "output", trained)
    reached = condition.grad
    assert reached is not None and reached.any(), "the output ignores the condition"
    assert reached.isfinite().all(), "the gradient of the condition is not finite"
