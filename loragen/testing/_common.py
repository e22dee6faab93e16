"""What the checks of several kinds of plugin have in common. Imports torch only when called."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5  # padding changes the order of sums, and so the last digits


def validated_options(cls: Any, options: dict[str, Any]) -> BaseModel:
    """The options as a Config, which refuses unknown ones, documents its own, and is plain data."""
    model: type[BaseModel] = cls.Config
    name = f"{cls.__name__}.Config"
    for field, info in model.model_fields.items():
        assert info.description, f"{name}.{field} has no description (what it means, and its unit)"
    config = model.model_validate(options)
    again = model.model_validate(config.model_dump(mode="json"))
    assert again == config, f"{name} does not survive model_dump(mode='json'): {again!r}"
    try:
        model.model_validate({**options, "no_such_option": 1})
    except ValidationError:
        return config
    raise AssertionError(f'{name} accepts unknown options; declare it with extra="forbid"')


def built(cls: Any, *arguments: Any) -> Any:
    """An `nn.Module` of this class, in eval mode."""
    import torch

    module = cls(*arguments)
    assert isinstance(module, torch.nn.Module), f"{cls.__name__} is not an nn.Module"
    return module.eval()


def trainable(module: Any) -> dict[str, Tensor]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def disturb(parameters: Iterable[Tensor]) -> None:
    """As a little training would. What starts at zero would answer every check with zeros."""
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


def saved_and_loaded(module: Any) -> dict[str, Tensor]:
    """Its state dict, as it comes back from a file."""
    import torch

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where the shapes already differ."""
    return float((a - b).detach().abs().max()) if a.shape == b.shape else math.inf
