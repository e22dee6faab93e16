"""Where a demo keeps what it makes, and the datasets that it begins with.

Nothing here imports torch: a directory or a world that will not do is answered at once.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loragen.core.errors import UsageError
from loragen.core.files import write_text
from loragen.core.progress import Progress
from loragen.demo.world import PAIRS, TRAIN_CREATURES, WORLD_FILE, Pair, Row, Wording, World

PROMPT_REPEATS = 2
"""Of every training creature in what the generator reads, out of what the adapters are trained on:
more would mostly take time to embed."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """Where things are and what was drawn."""

    out: Path
    seed: int
    world: World
    say: Say
    progress: Progress
    started: float = field(default_factory=time.perf_counter)

    def data(self, pair: Pair, split: str, wordings: Wording) -> Path:
        suffix = "" if wordings == "train" else "_unseen"
        return self.out / "data" / pair.name / f"{split}{suffix}.jsonl"


def begin(
    out: Path, seed: int, world_file: Path | None, force: bool, say: Say, progress: Progress
) -> Demo:
    """A demo in `out`, all datasets written.

    Raises ConfigError for a world that is none, UsageError rather than touch anything that is not
    an earlier demo.
    """
    demo = Demo(out, seed, World.load(world_file), say, progress)
    world_text = (world_file or WORLD_FILE).read_text(encoding="utf-8")
    _make_room(out, force)
    write_data(demo, world_text)
    return demo


def write_data(demo: Demo, world_text: str) -> None:
    """The world file, every dataset in both kinds of wording, and what the generator reads."""
    write_text(demo.out / "world.yaml", world_text)
    for pair in PAIRS:
        read = demo.world.train_rows(pair)[: PROMPT_REPEATS * len(TRAIN_CREATURES)]
        write_text(demo.data(pair, "prompts", "train"), _lines(read))
        for wordings in ("train", "unseen"):
            for split, rows in (
                ("train", demo.world.train_rows(pair, wordings=wordings)),
                ("test", demo.world.test_rows(pair, wordings)),
            ):
                write_text(demo.data(pair, split, wordings), _lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _make_room(out: Path, force: bool) -> None:
    """Raises UsageError rather than touch anything that is not an earlier demo."""
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UsageError(f"{out} exists already; choose another --output or add --force")
        if not (out / "world.yaml").is_file():
            raise UsageError(f"{out} is not the directory of a demo; choose another --output")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
