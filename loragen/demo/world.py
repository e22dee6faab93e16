"""The made-up world of `loragen demo`: 96 creatures, 8 attributes, 5 ways to answer.

A dataset is one pair (attribute, style). The facts are fixed, and the shipped base model
(see `build_base.py`) knows them all; only the wordings of the questions come from a file,
`world.yaml` or the user's own. Every draw is a hash of what is drawn, never a random number
generator: the world must be the same in every Python version, or the base would be wrong.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loragen.core.errors import ConfigError

WORLD_FILE = Path(__file__).with_name("world.yaml")
BASE_DIR = Path(__file__).with_name("base")
PLACEHOLDER = "{creature}"
HELD_OUT = 8
TRAIN_REPEATS = 4

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
ATTRIBUTES: tuple[str, ...] = tuple(VALUES)

_HEADS, _TAILS = (
    part.split()
    for part in (
        "blo dru fli gra ki mo nop pli quo sne tra vo wim yu zal ske",
        "bbit dgen ffle lmo mpet nko rvin sk ttle xor zzin gru",
    )
)

Row = dict[str, str]
Wording = Literal["train", "unseen"]


class Pair(NamedTuple):
    """What one dataset asks for: an attribute, answered in a style."""

    attribute: str
    style: str

    @property
    def name(self) -> str:
        return f"{self.attribute}-{self.style}"


PAIRS: tuple[Pair, ...] = tuple(Pair(a, s) for a, s in product(VALUES, STYLES))


def _rank(*parts: object) -> int:
    """A number that depends on nothing but its arguments; sorting by it is a fair shuffle."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _creatures() -> tuple[str, ...]:
    names = [head + tail for head, tail in product(_HEADS, _TAILS)]
    return tuple(sorted(names, key=lambda name: _rank("creature", name))[:96])


def _facts() -> dict[str, dict[str, str]]:
    """Values dealt out like cards, so that no value of an attribute is a good guess."""
    facts: dict[str, dict[str, str]] = {creature: {} for creature in CREATURES}
    for attribute, values in VALUES.items():
        dealt = sorted(CREATURES, key=lambda name: _rank("fact", attribute, name))
        for position, creature in enumerate(dealt):
            facts[creature][attribute] = values[position % len(values)]
    return facts


CREATURES: tuple[str, ...] = _creatures()
TRAIN_CREATURES: tuple[str, ...] = CREATURES[:64]
TEST_CREATURES: tuple[str, ...] = CREATURES[64:]
FACTS: dict[str, dict[str, str]] = _facts()


def expected_answer(creature: str, pair: Pair) -> str:
    """The one right answer about a creature in the dataset of a pair."""
    value = FACTS[creature][pair.attribute]
    return STYLES[pair.style].replace("{}", value)


class Wordings(BaseModel):
    """The ways to ask for one attribute or one style."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[str, ...] = Field(min_length=1, description="Wordings that training rows use.")
    unseen: tuple[str, ...] = Field(min_length=1, description="Wordings kept for the test.")


class WorldFile(BaseModel):
    """What a world file may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: dict[str, Wordings]
    styles: dict[str, Wordings]
    held_out: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True)
class World:
    """The fixed facts, asked in the words of one file."""

    attributes: dict[str, Wordings]
    styles: dict[str, Wordings]
    held_out: tuple[Pair, ...] | None

    @classmethod
    def load(cls, path: Path | None = None) -> "World":
        """Read a world file (the shipped one by default); ConfigError tells all its faults."""
        path = path or WORLD_FILE
        file = _parse(path)
        if faults := [f"{path}: {fault}" for fault in _faults(file)]:
            raise ConfigError(*faults)
        held_out = None if file.held_out is None else tuple(Pair(*pair) for pair in file.held_out)
        return cls(file.attributes, file.styles, held_out)

    def held_out_pairs(self, seed: int) -> tuple[Pair, ...]:
        """The pairs kept from all training: the file's, or eight drawn from the seed.

        No attribute and no style gives up more than two of its pairs, so each of them is still
        met in other combinations: what is new about a held-out pair is the combination.
        """
        if self.held_out is not None:
            return self.held_out
        chosen: list[Pair] = []
        taken: Counter[str] = Counter()
        for pair in sorted(PAIRS, key=lambda pair: _rank("held out", seed, pair.name)):
            if len(chosen) < HELD_OUT and max(taken[part] for part in pair) < 2:
                chosen.append(pair)
                taken.update(pair)
        return tuple(sorted(chosen, key=PAIRS.index))

    def training_pairs(self, seed: int) -> tuple[Pair, ...]:
        """The pairs that are not held out."""
        held_out = self.held_out_pairs(seed)
        return tuple(pair for pair in PAIRS if pair not in held_out)

    def sample_training_pairs(self, seed: int, count: int) -> tuple[Pair, ...]:
        """Some training pairs, drawn from the seed, of attributes and styles in turn."""
        drawn = sorted(self.training_pairs(seed), key=lambda pair: _rank("seen", seed, pair.name))
        taken: Counter[str] = Counter()
        chosen: list[Pair] = []
        while len(chosen) < min(count, len(drawn)):
            left = [pair for pair in drawn if pair not in chosen]
            pair = min(left, key=lambda pair: sum(taken[part] for part in pair))
            chosen.append(pair)
            taken.update(pair)
        return tuple(sorted(chosen, key=PAIRS.index))

    def rows(
        self,
        pair: Pair,
        creatures: Sequence[str],
        wordings: Wording = "train",
        repeats: int = 1,
    ) -> list[Row]:
        """Questions and answers of one dataset: every creature once per repeat.

        The draw of the wordings does not look at the pair: row i of every dataset asks about
        the same creature with the wordings of the same numbers. Adapters trained on the same
        batches of rows then differ by what was asked, not by chance.
        """
        asks = getattr(self.attributes[pair.attribute], wordings)
        ends = getattr(self.styles[pair.style], wordings)
        cells = list(product(range(repeats), creatures))
        draws = _deal(cells, len(asks), len(ends))
        return [
            {
                "prompt": f"{asks[ask].replace(PLACEHOLDER, creature)} {ends[end]}",
                "response": expected_answer(creature, pair),
            }
            for (_, creature), (ask, end) in zip(cells, draws, strict=True)
        ]

    def train_rows(self, pair: Pair, wordings: Wording = "train") -> list[Row]:
        """What an adapter is trained on: the training creatures, several times each."""
        return self.rows(pair, TRAIN_CREATURES, wordings, TRAIN_REPEATS)

    def test_rows(self, pair: Pair, wordings: Wording) -> list[Row]:
        """What an adapter is tested on: creatures that no training row names."""
        return self.rows(pair, TEST_CREATURES, wordings)


def _deal(cells: Sequence[tuple[int, str]], asks: int, ends: int) -> list[tuple[int, int]]:
    """For each cell the numbers of its two wordings, all combinations about equally often."""
    deck = sorted(product(range(asks), range(ends)), key=lambda card: _rank("card", *card))
    shuffled = sorted(range(len(cells)), key=lambda index: _rank("deal", *cells[index]))
    draws = [(0, 0)] * len(cells)
    for position, index in enumerate(shuffled):
        draws[index] = deck[position % len(deck)]
    return draws


def _parse(path: Path) -> WorldFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{path}: cannot read the world file: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: this is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: needs the keys attributes and styles; copy {WORLD_FILE}")
    try:
        return WorldFile.model_validate(content)
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; compare {WORLD_FILE}"
            for fault in error.errors()
        ]
        raise ConfigError(*faults) from error


def _faults(file: WorldFile) -> Iterable[str]:
    """What pydantic cannot see, each with what to do about it."""
    yield from _key_faults("attributes", file.attributes, VALUES)
    yield from _key_faults("styles", file.styles, STYLES)
    yield from _wording_faults(file)
    yield from _overlap_faults(file)
    yield from _held_out_faults(file.held_out or ())
    if file.held_out is not None and not file.held_out:
        yield "held_out: the list is empty; name some pairs or remove the key"


def _key_faults(kind: str, found: Iterable[str], known: Iterable[str]) -> Iterable[str]:
    there, needed = set(found), list(known)
    for name in sorted(there.difference(needed)):
        yield f"{kind}: the world has no {name!r}; remove it (there are: {', '.join(needed)})"
    for name in needed:
        if name not in there:
            yield f"{kind}: {name!r} is missing; give its wordings (needed: {', '.join(needed)})"


def _texts(file: WorldFile, wordings: Wording) -> Iterator[tuple[str, str]]:
    """Where each wording stands, and the wording."""
    for kind, group in (("attributes", file.attributes), ("styles", file.styles)):
        for name, entry in group.items():
            for text in entry.train if wordings == "train" else entry.unseen:
                yield f"{kind}.{name}.{wordings}", text


def _wording_faults(file: WorldFile) -> Iterable[str]:
    for where, text in (*_texts(file, "train"), *_texts(file, "unseen")):
        if not text.strip():
            yield f"{where}: a wording is empty; write it or remove the line"
        elif where.startswith("attributes") and PLACEHOLDER not in text:
            yield f"{where}: {text!r} lacks {PLACEHOLDER}; put it where the name belongs"


def _overlap_faults(file: WorldFile) -> Iterable[str]:
    seen = {_plain(text): where for where, text in _texts(file, "train")}
    for where, text in _texts(file, "unseen"):
        if _plain(text) in seen:
            yield f"{where}: {text!r} is also in {seen[_plain(text)]}; remove one of the two"


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _held_out_faults(pairs: Sequence[tuple[str, str]]) -> Iterable[str]:
    for pair in pairs:
        if pair not in PAIRS:
            known = f"attributes: {', '.join(VALUES)}; styles: {', '.join(STYLES)}"
            yield f"held_out: {list(pair)} is not [attribute, style]; {known}"
        if pairs.count(pair) > 1:
            yield f"held_out: {list(pair)} is named twice; remove one"
    if not set(PAIRS).difference(pairs):
        yield "held_out: nothing is left to train on; hold out fewer"
