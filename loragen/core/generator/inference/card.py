"""The README.md of a generated adapter: what it is, where it comes from, and its limits."""

import json
from pathlib import Path

from loragen.core.config import DEMO
from loragen.core.errors import listing
from loragen.core.generator.inference.origin import Origin

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
    finding = "from loragen.core.base_names import resolve_base\n"
    code = LOADING.format(base=f'resolve_base("{DEMO}")')
    return code.replace("from peft", f"{finding}from peft", 1) + DEMO_BASE
