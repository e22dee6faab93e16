"""A generator out of a checkpoint of its training: what a checkpoint tells beside the weights."""

from typing import TYPE_CHECKING, Any

from torch import nn

from loragen.core.errors import DataError

if TYPE_CHECKING:
    from loragen.core.generator.model import Generator

KEY = "generator"
"""Of a checkpoint, beside Lightning's own keys."""
AVERAGED = "averaged.module."


def description(generator: "Generator", kept: nn.ModuleDict, total_steps: int) -> dict[str, Any]:
    """For the checkpoint of a training whose weights, averaged or not, are `kept` now.

    An encoder that trains along has moved since the prompts were last embedded, so that it is not
    known how far others are from them.
    """
    described = {**generator.description(), "total_steps": total_steps}
    if "encoder" in kept:
        encoder: Any = kept["encoder"]
        described |= {"encoder_fingerprint": encoder.fingerprint, "familiarity": None}
    return described


def is_checkpoint(document: dict[str, Any]) -> bool:
    return "pytorch-lightning_version" in document


def generator_document(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the generator's file would hold after the checkpoint's step.

    Raises DataError where it is not of `gen train`, or of one that did not describe them yet.
    """
    if KEY not in checkpoint:
        raise DataError(
            "not a checkpoint to generate with: it is of another training than `gen train`'s, or "
            "an earlier loragen's; go on with that (`gen train --resume`) or name a finished run"
        )
    state = checkpoint["state_dict"]
    averaged = AVERAGED if any(key.startswith(AVERAGED) for key in state) else ""
    return {
        **checkpoint[KEY],
        "state_dict": _part(state, f"{averaged}network."),
        "encoder_state": _part(state, f"{averaged}encoder.") or None,
    }


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
