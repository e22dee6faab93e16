"""What a generator makes: an adapter that knows where it comes from, and how it is written."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loragen.core.adapters import Adapter, attach_adapter, write_adapter, write_safetensors
from loragen.core.files import written_atomically
from loragen.core.generator.inference.card import adapter_card
from loragen.core.generator.inference.origin import Origin
from loragen.core.generator.inference.outputs import check_output


@dataclass(repr=False)  # the line that an Adapter is
class GeneratedAdapter(Adapter):
    """An adapter like any other, with its origin."""

    origin: Origin

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes a PEFT directory, or one file where `path` ends in .safetensors or .pt.

        A .safetensors file holds the tensors by PEFT's keys, and in its metadata the JSON texts
        `adapter_config` and `generated`; a .pt file the same as `state_dict`, `adapter_config` and
        `generated`, and loads with `torch.load(path, weights_only=True)`. What is written appears
        whole or not at all. Raises UsageError where `path` exists already.
        """
        output = Path(path)
        check_output(output, overwrite)
        if output.suffix == ".safetensors":
            _write_safetensors(output, self)
        elif output.suffix == ".pt":
            _write_pt(output, self)
        else:
            write_adapter(output, self, adapter_card(self.origin))
        return output

    def attach(self, base: Any) -> Any:
        """`base`, a transformers model, with the adapter in it, as a `peft.PeftModel`.

        Raises LoragenError naming the first tensor that does not fit; `base` is then unchanged.
        """
        return attach_adapter(base, self, "the generated adapter")


def _write_safetensors(file: Path, adapter: GeneratedAdapter) -> None:
    metadata = {
        "format": "pt",
        "adapter_config": json.dumps(adapter.config),
        "generated": json.dumps(asdict(adapter.origin), ensure_ascii=False),
    }
    with written_atomically(file) as temporary:
        write_safetensors(temporary, adapter.tensors, metadata)


def _write_pt(file: Path, adapter: GeneratedAdapter) -> None:
    document = {
        "state_dict": adapter.tensors,
        "adapter_config": adapter.config,
        "generated": asdict(adapter.origin),
    }
    with written_atomically(file) as temporary:
        torch.save(document, temporary)
