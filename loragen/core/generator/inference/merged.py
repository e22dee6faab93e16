"""The base model with a generated adapter in its weights: a model of its own."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import loragen
from loragen.core.adapters import swap_adapter
from loragen.core.base_models import load_base
from loragen.core.files import write_json, write_text, written_atomically
from loragen.core.generator.inference.card import adapter_card
from loragen.core.generator.inference.generated import GeneratedAdapter
from loragen.core.generator.inference.outputs import check_output
from loragen.core.lora.merge import save_merged
from loragen.core.runs import MERGED_MARKER


class Merger:
    """Holds the base, in float32, for any number of adapters."""

    def __init__(self, base_model: str) -> None:
        """Raises UsageError where the base cannot be found, LoragenError where it does not load."""
        self.base = load_base(base_model, torch.float32)
        self._model: Any = None

    def save(self, adapter: GeneratedAdapter, output: Path, overwrite: bool = False) -> None:
        """A Hugging Face model directory in the base's stored dtype, with its tokenizer; appears
        whole or not at all. Raises LoragenError where the adapter does not fit the base."""
        check_output(output, overwrite, MERGED_MARKER)
        if self._model is None:
            self._model = adapter.attach(self.base.model)
        else:
            swap_adapter(self._model, adapter, "the generated adapter")
        document = {
            "base_model": self.base.name,
            "loragen": loragen.__version__,
            "generated": asdict(adapter.origin),
        }
        with written_atomically(output) as temporary:
            save_merged(self._model, self.base, temporary)
            write_text(temporary / "README.md", adapter_card(adapter.origin, merged=True))
            write_json(temporary / MERGED_MARKER, document)
