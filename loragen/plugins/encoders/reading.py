"""What encoders with a transformer share: loading it, reading texts in batches, saying what is cut.

Texts of similar length are read together. The embedding of a text does not depend on the others.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragen import LoragenError
from loragen.core.errors import counted, first_line
from loragen.core.files import user_path
from loragen.core.hub import hub_problem

log = logging.getLogger(__name__)


class ReadingEncoder(nn.Module, ABC):
    """An encoder that reads at most `limit` tokens of a text, and warns once of longer ones."""

    config: Any
    """Has `model` and `frozen`."""
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._warned_of_cut = False

    @property
    def frozen(self) -> bool:
        return bool(self.config.frozen)

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """The most tokens that the model reads; None if there is no limit."""

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @abstractmethod
    def embed(self, texts: Sequence[str], count: bool) -> tuple[list[Tensor], list[int]]:
        """Returns ``[positions, dim]`` float32 for each text, and, if they are to be counted, the
        tokens of each text that is longer than `limit`."""

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)  # a scalar has no bytes to view
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns embeddings ``[texts, positions, dim]`` float32, and a mask ``[texts, positions]``
        that is False on the padding of shorter texts."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # reduces padding
        rows: dict[int, Tensor] = {}
        cut: list[int] = []
        for first in range(0, len(texts), self.batch_size):
            chosen = order[first : first + self.batch_size]
            embedded, lengths_of_cut = self.embed(
                [texts[index] for index in chosen], count=not self._warned_of_cut
            )
            rows |= zip(chosen, embedded, strict=True)
            cut += lengths_of_cut
        if cut:
            self._warn_of_cut(cut, len(texts))
        lengths = torch.tensor([len(rows[index]) for index in range(len(texts))], dtype=torch.long)
        if not rows:
            return torch.zeros(0, 1, self.dim), torch.zeros(0, 1, dtype=torch.bool)
        embeddings = nn.utils.rnn.pad_sequence([rows[i] for i in range(len(texts))], True)
        mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
        return embeddings, mask.to(embeddings.device)

    def _warn_of_cut(self, cut: Sequence[int], texts: int) -> None:
        """Warns of texts that are cut; `cut` are their tokens."""
        self._warned_of_cut, most = True, self.limit or 0
        log.warning(
            "%d of %s %s more than the %d tokens that the encoder %s reads: of %s the "
            "first %.0f %% were read (data.samples_per_prompt joins prompts to a text)",
            len(cut),
            counted(texts, "text"),
            "has" if len(cut) == 1 else "have",
            most,
            self.config.model,
            "that one" if len(cut) == 1 else "these",
            100 * most * len(cut) / sum(cut),
        )


def directory_or_hub_id(model: str) -> str | Path:
    """Returns a directory, or a hub id. Raises LoragenError for what can only be a directory that
    is missing."""
    path = user_path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or "\\" in model:
        raise LoragenError(f"encoder {model}: no such directory")
    return model


@contextmanager
def loading(model: str, source: str | Path, remedy: str = "") -> Iterator[bool]:
    """Yields whether only local files may be used. An error of the block becomes one line, with
    `remedy` where the hub was to blame."""
    from transformers.utils import logging as bars

    unreachable = None if isinstance(source, Path) else hub_problem()
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # loading the weights takes a moment
    try:
        yield isinstance(source, Path) or unreachable is not None
    except LoragenError:
        raise
    except Exception as error:  # the libraries raise what they meet in a file
        reason = unreachable or first_line(error)
        if isinstance(error, LookupError | TypeError | AttributeError):
            reason = f"{type(error).__name__}: {reason}"
        where = "" if isinstance(source, Path) else remedy
        raise LoragenError(f"encoder {model}: does not load: {reason}{where}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
