"""The contract of an encoder. Torch is imported only when the check is called."""

from __future__ import annotations

from typing import Any

from loragen.testing._common import (
    TOLERANCE,
    built,
    disturb,
    largest_difference,
    saved_and_loaded,
    trainable,
    validated_options,
)

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
