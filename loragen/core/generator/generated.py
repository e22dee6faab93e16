"""Where a generated adapter comes from: plain data, written beside its weights.

The README.md of a generated adapter: what it is, where it comes from, and its limits.

What a generator makes: an adapter that knows where it comes from, and how it is written.

The base model with a generated adapter in its weights: a model of its own.

Generate: prompts of an unseen dataset -> an adapter's files. No base model, no training.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loragen.core.adapter import MERGED_MARKER
from loragen.core.adapter.export import save_merged
from loragen.core.adapter.files import (
    Adapter,
    attach_adapter,
    swap_adapter,
    write_adapter,
    write_safetensors,
)
from loragen.core.base.load import load_base
from loragen.core.config import DEMO
from loragen.core.errors import listing
from loragen.core.files import write_json, write_text, written_atomically
from loragen.core.generator.requests import check_output


@dataclass(frozen=True)
class Origin:
    generator: str
    """The name of the experiment, or of the file."""
    format_version: int
    """Of the generator's file."""
    base_model: str
    encoder: str
    decoder: str
    prompts: int
    prompts_sha256: str
    """Of all prompts in their order."""
    draws: int = 1
    prompts_per_draw: int = 0
    seed: int | None = None
    """Of the draws; None where all prompts were read at once."""
    plugins: list[dict[str, str]] = field(default_factory=list)
    """`kind`, `name`, `distribution` and `version` of what made the generator."""
    datasets: list[str] = field(default_factory=list)
    """What the generator was trained on."""
    nearest_dataset: str | None = None
    distance: float | None = None
    """Of the prompts to the training, in units of its reach (`familiarity`); None of a generator
    that was trained before this was measured."""
    far: bool = False
    """Whether that is too far to expect an adapter that does what the prompts ask."""
    vague: bool = False
    """Whether the prompts are too few to tell which dataset they are of."""

    def warning(self) -> str | None:
        """One line for the user where the prompts are not like those of the training."""
        if self.far:
            return (
                "these prompts are far from everything the generator was trained on, "
                f"{self.distance:g} times its reach from the nearest dataset, "
                f"{self.nearest_dataset} (within is below 1): evaluate the adapter before you "
                "expect anything of it"
            )
        if self.vague:
            return (
                f"{self.prompts_per_draw} of such prompts do not tell one dataset from another: "
                "give more of them, as in training"
            )
        return None


LOADING = """## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "DIRECTORY OF THIS FILE")
```
"""
MERGED = """## How to load it

The adapter is merged into the base model's weights:
`AutoModelForCausalLM.from_pretrained("DIRECTORY OF THIS FILE")`.
"""
DEMO_BASE = """
The base `demo` is the tiny model that ships with loragen; `resolve_base` tells where it lies.
`loragen lora export DIRECTORY --output OTHER` writes an adapter with that path in it.
"""


def adapter_card(origin: Origin, merged: bool = False) -> str:
    """Markdown with the front matter that the Hugging Face hub reads, of a PEFT directory or of
    the base with the adapter `merged` into it."""
    loading = MERGED if merged else _loading(origin)
    return "\n".join((_front_matter(origin, merged), _what(origin), _limits(origin), loading))


def _front_matter(origin: Origin, merged: bool) -> str:
    """The hub takes a hub id for `base_model`; a directory or `demo` would be a broken link."""
    place = Path(origin.base_model)
    hub_id = origin.base_model != DEMO and not place.is_absolute() and not place.is_dir()
    base = f"base_model: {json.dumps(origin.base_model)}\n" if hub_id else ""
    library = "transformers" if merged else "peft"
    return f"---\n{base}library_name: {library}\ntags: [lora, loragen, generated]\n---\n"


def _what(origin: Origin) -> str:
    plugins = ", ".join(
        f"{p['kind']} {p['name']} ({p['distribution']} {p['version']})" for p in origin.plugins
    )
    drawn = (
        ""
        if origin.seed is None
        else f"; the mean of {origin.draws} random draws of {origin.prompts_per_draw} "
        f"(seed {origin.seed})"
    )
    return (
        "# A generated LoRA adapter\n\n"
        "Written by loragen, after [Drag-and-Drop LLMs](https://arxiv.org/abs/2506.16406), from "
        "prompts without labels; no training took place.\n\n"
        f"- **base model**: {origin.base_model}\n"
        f"- **prompts**: {origin.prompts} (sha256 {origin.prompts_sha256}){drawn}\n"
        f"- **generator**: {origin.generator}, file format {origin.format_version}; "
        f"{plugins or f'encoder {origin.encoder}, decoder {origin.decoder}'}\n"
        f"- **trained on**: {len(origin.datasets)} datasets: {listing(origin.datasets)}\n"
    )


def _limits(origin: Origin) -> str:
    far = (
        "How far the prompts are from the training is not known: it has seen a single text."
        if origin.distance is None
        else f"The nearest training dataset, {origin.nearest_dataset}, is {origin.distance:g} "
        "times the training's reach away from the prompts: below 1 is within it."
    )
    warning = "\n\n**Warning**: " + said if (said := origin.warning()) else ""
    return (
        "## Intended use and limits\n\n"
        "For prompts of the kind it was made from, on that base model. Nothing was learned from "
        "labels of this dataset, and nothing measured on it: evaluate before you rely on it "
        f"(`loragen lora eval --adapter DIR --dataset FILE`).\n\n{far}{warning}\n"
    )


def _loading(origin: Origin) -> str:
    if origin.base_model != DEMO:
        return LOADING.format(base=json.dumps(origin.base_model))
    finding = "from loragen.core.base.names import resolve_base\n"
    code = LOADING.format(base=f'resolve_base("{DEMO}")')
    return code.replace("from peft", f"{finding}from peft", 1) + DEMO_BASE


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
            "loragen": version("loragen"),
            "generated": asdict(adapter.origin),
        }
        with written_atomically(output) as temporary:
            save_merged(self._model, self.base, temporary)
            write_text(temporary / "README.md", adapter_card(adapter.origin, merged=True))
            write_json(temporary / MERGED_MARKER, document)
