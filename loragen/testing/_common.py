"""Helpers of several checks. Torch is imported only when a check is called."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5  # padding changes the order of sums, and with it the last digits


def validated_options(cls: Any, options: dict[str, Any]) -> BaseModel:
    """Returns the options as a Config, which has to document its fields, reject unknown ones, and
    survive a round trip through plain data."""
    model: type[BaseModel] = cls.Config
    name = f"{cls.__name__}.Config"
    for field, info in model.model_fields.items():
        assert info.description, f"{name}.{field} has no description (its meaning and unit)"
    config = model.model_validate(options)
    again = model.model_validate(config.model_dump(mode="json"))
    assert again == config, f"{name} does not survive model_dump(mode='json'): {again!r}"
    try:
        model.model_validate({**options, "no_such_option": 1})
    except ValidationError:
        return config
    raise AssertionError(f'{name} accepts unknown options; declare it with extra="forbid"')


def built(cls: Any, *arguments: Any) -> Any:
    """Returns an instance in eval mode, which has to be an `nn.Module`."""
    import torch

    module = cls(*arguments)
    assert isinstance(module, torch.nn.Module), f"{cls.__name__} is not an nn.Module"
    return module.eval()


def trainable(module: Any) -> dict[str, Tensor]:
    """Returns the parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def disturb(parameters: Iterable[Tensor]) -> None:
    """Changes parameters a little, as training would, since zero-initialised ones hide errors."""
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


def saved_and_loaded(module: Any) -> dict[str, Tensor]:
    """Returns the module's state dict after a round trip through a file."""
    import torch

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference; infinity if the shapes differ."""
    return float((a - b).detach().abs().max()) if a.shape == b.shape else math.inf
