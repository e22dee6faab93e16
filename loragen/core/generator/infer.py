"""Generate: prompts of an unseen dataset -> a PEFT adapter. No base model, no training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loragen.core.adapters import write_adapter
from loragen.core.errors import UsageError
from loragen.core.files import sha256_text
from loragen.core.generator.model import Generator
from loragen.core.protocols import Encoder


@dataclass(frozen=True)
class Generated:
    directory: Path
    values: int
    prompts: int
    seconds: float
    """From prompts to files; the encoder and the generator were loaded before."""


def infer(
    generator: Generator, encoder: Encoder, prompts: Sequence[str], directory: Path
) -> Generated:
    """Writes the adapter that the generator makes of the prompts. Appears whole or not at all.

    Raises UsageError where no prompt has any text.
    """
    if not any(prompt.strip() for prompt in prompts):
        raise UsageError("no prompts: there is no text in any of them")
    started = time.perf_counter()
    adapter = generator.generate(encoder, prompts)
    write_adapter(directory, adapter, _card(generator, prompts))
    seconds = time.perf_counter() - started
    return Generated(directory, generator.layout.values, len(prompts), round(seconds, 4))


def _card(generator: Generator, prompts: Sequence[str]) -> str:
    name = generator.base_model
    return (
        f"---\nbase_model: {name}\nlibrary_name: peft\ntags: [lora, loragen, generated]\n---\n\n"
        f"# A generated LoRA adapter\n\n"
        f"Made by `loragen gen infer` from {len(prompts)} unlabelled prompts "
        f"(sha256 {sha256_text(*prompts)[:16]}), without training.\n\n"
        f"- base model: {name}\n"
        f"- generator: {generator.encoder.name} -> {generator.decoder.name}, "
        f"trained on {len(generator.provenance.get('sources', []))} datasets\n"
        f"- evaluate it before you rely on it: `loragen lora eval --adapter DIR --dataset FILE`\n"
    )
