"""Gradient checkpointing (arXiv 1604.06174) of a frozen base model, with equal results.

transformers' own switch works in training mode alone, in which some models drop values of the
frozen base. Here the layers are wrapped instead, and the model stays in evaluation mode.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loragen.core.errors import LoragenError


@contextmanager
def gradient_checkpointing(
    model: Any, during_recomputation: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """In the block, forward passes keep only the input of each layer for their backward passes,
    which compute the layer's activations again: a third more time, for the memory of one layer
    instead of all. The backward pass may come after the block.

    Whatever the block changes about the layers for a forward pass, such as hooks, has to be changed
    again within `during_recomputation`. Dropout draws the same values again. Raises LoragenError if
    the layers of the model are not found.
    """
    layers = transformer_layers(model)
    # accelerate sets a `forward` on the layers of a quantised base; others have that of the class.
    before = [{k: v for k, v in vars(layer).items() if k == "forward"} for layer in layers]
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, during_recomputation)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            vars(layer).update(own)


def transformer_layers(model: Any) -> list[nn.Module]:
    """Returns the layers of a model of transformers, in their order: the list of as many modules as
    its configuration has hidden layers. Raises LoragenError if there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise LoragenError(
        f"gradient checkpointing: {type(model).__name__} has no list of its {count} layers; "
        "set gradient_checkpointing=false"
    )


def _checkpointed(
    forward: Callable[..., Any],
    during_recomputation: Callable[[], AbstractContextManager[Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        # Reentrant checkpoints give no gradients if no input needs one, as in a frozen base.
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), during_recomputation()),
        **kwargs,
    )
