"""Generate: prompts of an unseen dataset -> an adapter's files. No base model, no training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loragen.core.generator.inference.merged import Merger
from loragen.core.generator.inference.origin import Origin
from loragen.core.generator.model import Generator


@dataclass(frozen=True)
class Generated:
    """What was written, and how long it took."""

    path: Path
    values: int
    origin: Origin
    seconds: float
    """From prompts to files; the encoder and the generator were loaded before."""


def infer(
    generator: Generator,
    prompts: Sequence[str],
    output: Path,
    *,
    draws: int = 1,
    prompts_per_draw: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    merger: Merger | None = None,
) -> Generated:
    """Writes the adapter that the generator makes of the prompts, as `GeneratedAdapter.save` does;
    with a `merger`, the base with the adapter in it.

    Raises UsageError where no prompt has any text or `output` exists already.
    """
    _ = generator.text_encoder  # loading is not generating
    started = time.perf_counter()
    adapter = generator.generate(prompts, draws, prompts_per_draw, seed)
    if merger:
        merger.save(adapter, output, overwrite)
    else:
        adapter.save(output, overwrite)
    seconds = time.perf_counter() - started
    return Generated(output, generator.layout.values, adapter.origin, round(seconds, 4))
