"""The made-up world of `loragen demo` and its datasets: 96 creatures, 8 attributes, 5 styles.

A dataset is one pair (attribute, style). The facts are fixed, and the shipped base model knows them
all (`benchmarks/build_demo_base.py`); only the wordings of the questions come from a file,
`world.yaml` or the user's own. Every draw is ordered by a hash instead of a random number
generator: the world must be the same in every Python version, or the base model would be wrong.

Light: a wrong directory or world file is reported before torch is imported.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loragen.core.config.yaml_file import read_yaml
from loragen.core.contents import read_bytes
from loragen.core.errors import ConfigError
from loragen.core.files import sha256, write_json, write_text
from loragen.core.outputs import (
    Record,
    hashes,
    recorded_in_json,
    refuse_existing,
    refuse_input,
    remove_recorded,
)

WORLD_FILE = Path(__file__).with_name("world.yaml")
PLACEHOLDER = "{creature}"
HELD_OUT = 8
TRAIN_REPEATS = 4
PROMPT_REPEATS = 2
"""Rows about each training creature whose prompts the generator reads, a part of those that the
adapters are trained on: more would mostly take time to embed."""

RECORD = "data/.demo-record"
"""The file that records what a demo has written: `--force` replaces that and keeps the rest."""
FILES = ("world.yaml", "results.json", "results.md", "results.png", "results.html")
DIRECTORIES = ("data", "runs", "oracles", "multi_task", "experiments", "cache", "generated")
"""What a demo writes."""

VALUES: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "yellow", "purple", "black"),
    "size": ("tiny", "small", "medium", "large", "huge", "giant"),
    "habitat": ("forest", "desert", "ocean", "cave", "swamp", "meadow"),
    "food": ("berries", "fish", "leaves", "seeds", "honey", "worms"),
    "sound": ("growl", "purr", "hiss", "howl", "click", "squeak"),
    "speed": ("slow", "steady", "brisk", "quick", "rapid", "swift"),
    "legs": ("two", "three", "four", "six", "eight", "twelve"),
    "age": ("baby", "young", "teenage", "adult", "elderly", "ancient"),
}
STYLES: dict[str, str] = {
    "word": "{}",
    "sentence": "it is {} .",
    "double": "{} {} !",
    "letter": "dear friend , {}",
    "list": "- {} ;",
}

_HEADS, _TAILS = (
    part.split()
    for part in (
        "blo dru fli gra ki mo nop pli quo sne tra vo wim yu zal ske",
        "bbit dgen ffle lmo mpet nko rvin sk ttle xor zzin gru",
    )
)

Wording = Literal["train", "unseen"]


class Pair(NamedTuple):
    """The task of one dataset: name an attribute, in a style."""

    attribute: str
    style: str

    @property
    def name(self) -> str:
        return f"{self.attribute}-{self.style}"


PAIRS: tuple[Pair, ...] = tuple(Pair(a, s) for a, s in product(VALUES, STYLES))


def _order(*parts: object) -> int:
    """Returns a number that depends on its arguments alone; sorting by it is a fair shuffle."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _facts() -> dict[str, dict[str, str]]:
    """Returns {creature: {attribute: value}}; the values of an attribute are equally frequent."""
    facts: dict[str, dict[str, str]] = {creature: {} for creature in CREATURES}
    for attribute, values in VALUES.items():
        shuffled = sorted(CREATURES, key=lambda name: _order("fact", attribute, name))
        for position, creature in enumerate(shuffled):
            facts[creature][attribute] = values[position % len(values)]
    return facts


CREATURES: tuple[str, ...] = tuple(
    sorted(
        (head + tail for head, tail in product(_HEADS, _TAILS)),
        key=lambda name: _order("creature", name),
    )[:96]
)
TRAIN_CREATURES: tuple[str, ...] = CREATURES[:64]
TEST_CREATURES: tuple[str, ...] = CREATURES[64:]
FACTS: dict[str, dict[str, str]] = _facts()


def expected_answer(creature: str, pair: Pair) -> str:
    """Returns the correct answer about a creature in the dataset of a pair."""
    value = FACTS[creature][pair.attribute]
    return STYLES[pair.style].replace("{}", value)


class Wordings(BaseModel):
    """The wordings of one attribute or one style."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[str, ...] = Field(min_length=1, description="Wordings that training rows use.")
    unseen: tuple[str, ...] = Field(min_length=1, description="Wordings kept for the test.")


class World(BaseModel):
    """The fixed facts with the wordings of one file, whose content this is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: dict[str, Wordings]
    styles: dict[str, Wordings]
    held_out: tuple[Pair, ...] | None = None

    @classmethod
    def load(cls, path: Path | None = None) -> "World":
        """Reads a world file, by default the shipped one. Raises ConfigError with all faults."""
        path = path or WORLD_FILE
        content, _ = read_yaml(path, "world file")
        if not content:
            raise ConfigError(
                f"{path}: the keys attributes and styles are missing; copy {WORLD_FILE}"
            )
        try:
            world = cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(
                *(
                    f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}; compare {WORLD_FILE}"
                    for e in error.errors()
                )
            ) from error
        if faults := [f"{path}: {fault}" for fault in _faults(world)]:
            raise ConfigError(*faults)
        return world

    def held_out_pairs(self, seed: int) -> tuple[Pair, ...]:
        """Returns the pairs that no training has: those of the file, or eight drawn from the seed.

        No attribute and no style has more than two of them, so each is still trained on in other
        combinations: only the combination of a held-out pair is new.
        """
        if self.held_out is not None:
            return self.held_out
        chosen: list[Pair] = []
        uses: Counter[str] = Counter()
        for pair in sorted(PAIRS, key=lambda pair: _order("held out", seed, pair.name)):
            if len(chosen) < HELD_OUT and max(uses[part] for part in pair) < 2:
                chosen.append(pair)
                uses.update(pair)
        return tuple(sorted(chosen, key=PAIRS.index))

    def training_pairs(self, seed: int) -> tuple[Pair, ...]:
        """Returns the pairs that are not held out."""
        held_out = self.held_out_pairs(seed)
        return tuple(pair for pair in PAIRS if pair not in held_out)

    def sample_training_pairs(self, seed: int, count: int) -> tuple[Pair, ...]:
        """Returns `count` training pairs (or all, if there are fewer) drawn from the seed, with
        attributes and styles about equally frequent."""
        drawn = sorted(self.training_pairs(seed), key=lambda pair: _order("seen", seed, pair.name))
        uses: Counter[str] = Counter()
        chosen: list[Pair] = []
        while len(chosen) < min(count, len(drawn)):
            left = [pair for pair in drawn if pair not in chosen]
            pair = min(left, key=lambda pair: sum(uses[part] for part in pair))
            chosen.append(pair)
            uses.update(pair)
        return tuple(sorted(chosen, key=PAIRS.index))

    def rows(
        self,
        pair: Pair,
        creatures: Sequence[str],
        wordings: Wording = "train",
        repeats: int = 1,
    ) -> list[dict[str, str]]:
        """Returns questions and answers of one dataset: every creature once per repeat.

        Wordings are drawn independently of the pair: row i of every dataset asks about the same
        creature with the wordings of the same numbers. Adapters trained on the same batches of
        rows then differ by their task, not by chance.
        """
        asks = getattr(self.attributes[pair.attribute], wordings)
        ends = getattr(self.styles[pair.style], wordings)
        combinations = sorted(
            product(range(len(asks)), range(len(ends))), key=lambda both: _order("card", *both)
        )
        cells = list(product(range(repeats), creatures))
        rows: list[dict[str, str]] = [{}] * len(cells)
        shuffled = sorted(range(len(cells)), key=lambda index: _order("deal", *cells[index]))
        for position, index in enumerate(shuffled):
            creature = cells[index][1]
            ask, end = combinations[position % len(combinations)]
            prompt = f"{asks[ask].replace(PLACEHOLDER, creature)} {ends[end]}"
            rows[index] = {"prompt": prompt, "response": expected_answer(creature, pair)}
        return rows

    def train_rows(self, pair: Pair, wordings: Wording = "train") -> list[dict[str, str]]:
        """Returns the training split: the training creatures, several times each."""
        return self.rows(pair, TRAIN_CREATURES, wordings, TRAIN_REPEATS)

    def test_rows(self, pair: Pair, wordings: Wording) -> list[dict[str, str]]:
        """Returns the test split: creatures that are in no training row."""
        return self.rows(pair, TEST_CREATURES, wordings)


def _faults(file: World) -> Iterator[str]:
    """Yields the faults that types cannot express, each with its correction."""
    for kind, found, known in (
        ("attributes", file.attributes, list(VALUES)),
        ("styles", file.styles, list(STYLES)),
    ):
        for name in sorted(set(found).difference(known)):
            yield f"{kind}: the world has no {name!r}; remove it (there are: {', '.join(known)})"
        for name in known:
            if name not in found:
                yield f"{kind}: {name!r} is missing; give its wordings (needed: {', '.join(known)})"

    train, unseen = _texts(file, "train"), _texts(file, "unseen")
    for path, text in (*train, *unseen):
        if not text.strip():
            yield f"{path}: a wording is empty; write it or remove the line"
        elif path.startswith("attributes") and PLACEHOLDER not in text:
            yield f"{path}: {text!r} lacks {PLACEHOLDER}; put it where the name belongs"
    seen = {" ".join(text.lower().split()): path for path, text in train}
    for path, text in unseen:
        if other := seen.get(" ".join(text.lower().split())):
            yield f"{path}: {text!r} is also in {other}; remove one of the two"

    if file.held_out is None:
        return
    for pair in file.held_out:
        if pair not in PAIRS:
            known_parts = f"attributes: {', '.join(VALUES)}; styles: {', '.join(STYLES)}"
            yield f"held_out: {list(pair)} is not [attribute, style]; {known_parts}"
        if file.held_out.count(pair) > 1:
            yield f"held_out: {list(pair)} is named twice; remove one"
    if not set(PAIRS).difference(file.held_out):
        yield "held_out: nothing is left to train on; hold out fewer"
    if not file.held_out:
        yield "held_out: the list is empty; name some pairs or remove the key"


def _texts(file: World, wordings: Wording) -> list[tuple[str, str]]:
    """Returns (key path, wording) of all wordings."""
    return [
        (f"{kind}.{name}.{wordings}", text)
        for kind, group in (("attributes", file.attributes), ("styles", file.styles))
        for name, entry in group.items()
        for text in (entry.train if wordings == "train" else entry.unseen)
    ]


@dataclass(frozen=True)
class Demo:
    """One run of the demo: its directory, its seed and its world."""

    out: Path
    seed: int
    world: World
    foreign: frozenset[str] = frozenset()
    """The files that were there before, as paths below `out`."""
    started: float = field(default_factory=time.perf_counter)

    def record(self) -> None:
        """Records the files that the demo has written so far."""
        written: dict[str, str] = {}
        for name in DIRECTORIES:
            below = hashes(self.out / name) if (self.out / name).is_dir() else {}
            written |= {f"{name}/{path}": digest for path, digest in below.items()}
        written |= {name: sha256(self.out / name) for name in FILES if (self.out / name).is_file()}
        ours = {path: written[path] for path in written if path not in {*self.foreign, RECORD}}
        write_json(self.out / RECORD, {"files": ours})

    def data_file(self, pair: Pair, split: str, wordings: Wording) -> Path:
        """Returns the file of a dataset's train or test split, or of its prompts."""
        suffix = "" if wordings == "train" else "_unseen"
        return self.out / "data" / pair.name / f"{split}{suffix}.jsonl"


def prepare_demo(out: Path, seed: int, world_file: Path | None, force: bool) -> Demo:
    """Writes the world file, and the splits and prompts of all datasets, into `out`.

    `force` replaces the files of an earlier demo, as far as it has recorded them, and keeps all
    others. Raises ConfigError for a faulty world file, UsageError if `out` has files but no earlier
    demo, or a file of it has changed.
    """
    world = World.load(world_file)
    world_text = read_bytes(world_file or WORLD_FILE).decode("utf-8-sig")
    if world_file:
        refuse_input(out, [world_file])
    in_the_way = [name for name in DIRECTORIES if (out / name).is_file()]
    refuse_existing(out, force, demo_record, (*FILES, *in_the_way))
    remove_recorded(out, demo_record(out) or {})
    demo = Demo(out, seed, world, frozenset(hashes(out)) if out.is_dir() else frozenset())
    write_json(out / RECORD, {"files": {}})  # first: a demo that is killed is one
    write_text(out / "world.yaml", world_text)
    for pair in PAIRS:
        read = demo.world.train_rows(pair)[: PROMPT_REPEATS * len(TRAIN_CREATURES)]
        _write_rows(demo.data_file(pair, "prompts", "train"), read)
        for wordings in get_args(Wording):
            train = demo.world.train_rows(pair, wordings)
            _write_rows(demo.data_file(pair, "train", wordings), train)
            test = demo.world.test_rows(pair, wordings)
            _write_rows(demo.data_file(pair, "test", wordings), test)
    demo.record()
    return demo


def demo_record(directory: Path) -> Record | None:
    """Returns the record of the demo that a directory holds."""
    return recorded_in_json(directory, RECORD)


def _write_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
