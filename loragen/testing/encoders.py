"""The promise of an encoder. Imports torch only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loragen.testing._common import (
    TOLERANCE,
    built,
    disturb,
    largest_difference,
    saved_and_loaded,
    trainable,
    validated_options,
)

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = ("What is 2 + 3?", "Name a metal.", "Translate into French: the cat sleeps. " * 8)


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

    encoder, again = (built(cls, validated_options(cls, options)) for _ in range(2))
    embeddings, mask = encoder(list(TEXTS))
    _check_embeddings(cls.__name__, embeddings, mask, len(TEXTS), encoder.dim)
    torch.nn.Linear(encoder.dim, 1).to(embeddings)(embeddings).sum().backward()
    for index, text in enumerate(TEXTS):
        alone, alone_mask = encoder([text])
        difference = largest_difference(alone[alone_mask], embeddings[index][mask[index]])
        assert difference <= TOLERANCE, (
            f"{cls.__name__} embeds {text[:20]!r} differently beside others: by {difference:.1e}"
        )
    fingerprint = encoder.fingerprint
    assert isinstance(fingerprint, str) and fingerprint, "fingerprint must be a non-empty text"
    assert again.fingerprint == fingerprint, "equal encoders must have equal fingerprints"
    _check_no_texts(encoder)
    _check_training(encoder, again)


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


def _check_no_texts(encoder: Any) -> None:
    try:
        embeddings, mask = encoder([])
    except Exception:  # noqa: BLE001  # refusing is as good, however it is done
        return
    assert embeddings.shape[0] == mask.shape[0] == 0, "no texts must give no embeddings"


def _check_training(encoder: Any, again: Any) -> None:
    trained = trainable(encoder)
    assert isinstance(encoder.frozen, bool), f"frozen must be True or False, not {encoder.frozen!r}"
    assert encoder.frozen == (not trained), (
        f"frozen is {encoder.frozen}, and {len(trained)} parameters require gradients"
    )
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"no gradient reaches {name}"
    if not trained:
        return
    disturb(trained.values())
    before = encoder.fingerprint
    assert again.fingerprint != before, "the fingerprint does not change with the trained weights"
    again.load_state_dict(saved_and_loaded(encoder))
    assert again.fingerprint == before, "a loaded state dict gives another fingerprint"
    assert encoder(list(TEXTS))[0].equal(again(list(TEXTS))[0]), (
        "a fresh encoder with the loaded state dict embeds differently: something is not in it"
    )
