"""Generated adapters inside the live base, several at once, with gradients into their weights.

Each row of a forward pass has its own adapter. This is `torch.func.functional_call` of a PeftModel
once per adapter (a test compares them), in one pass: h + s · B (A x) as two batched products.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loragen.core.adapters import module_scaling
from loragen.core.errors import LoragenError
from loragen.core.generator.layout import Layout

PREFIX = "base_model.model."  # of PEFT's file keys


class Injection:
    """The places of a layout's matrices in a base model."""

    def __init__(self, model: nn.Module, layout: Layout, adapter_config: Mapping[str, Any]) -> None:
        """Raises LoragenError where the adapter is no plain LoRA on linear modules of the base."""
        self.modules: dict[str, nn.Module] = {}
        self.scaling: dict[str, float] = {}
        there = dict(model.named_modules())
        output = model.get_output_embeddings()  # type: ignore[operator]  # transformers' own
        for spec in layout.tensors:
            path = spec.key.removeprefix(PREFIX).partition(".lora_")[0]
            if spec.matrix not in ("lora_A", "lora_B") or len(spec.shape) != 2:
                raise LoragenError(
                    f"{spec.key}: only lora_A and lora_B of linear modules are known"
                )
            if path not in there:
                raise LoragenError(f"the base has no module {path}, which the adapter changes")
            if there[path] is output:
                raise LoragenError(f"{path}: adapters on the output layer are not trained through")
            self.modules[path] = there[path]
            self.scaling[path] = module_scaling(adapter_config, path)

    @contextmanager
    def injected(self, adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the base's batch is cut into as many equal parts as there are adapters,
        one after the other: ``{file key: [adapters, rows, columns]}``.

        Raises LoragenError in the forward pass where a module does not see the whole batch, as the
        routed experts of a mixture do not."""
        with ExitStack() as hooks:
            for path, module in self.modules.items():
                a, b = (adapters[f"{PREFIX}{path}.lora_{which}.weight"] for which in "AB")
                hook = _Added(a, b, self.scaling[path])
                hooks.callback(module.register_forward_hook(hook).remove)
            yield


class _Added:
    """A forward hook that adds every part's own scaled B A x."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        self.a, self.b, self.scaling = a, b, scaling  # (D, r, in), (D, out, r)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.ndim != 3 or len(x) % len(self.a):
            raise LoragenError(
                f"a module sees {list(x.shape)} of the batch, which {len(self.a)} adapters do not "
                "share equally (a routed expert?): set training.objective=reconstruction"
            )
        parts = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a)  # (D, rows * T, in)
        low = torch.bmm(parts, self.a.transpose(1, 2))  # (D, rows * T, r)
        added = torch.bmm(low, self.b.transpose(1, 2))  # (D, rows * T, out)
        return output + (self.scaling * added).view_as(output).to(output)
