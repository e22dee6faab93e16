"""Hashed n-grams of letters: nothing to download, nothing to load."""

import hashlib
from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn


class Hashing(nn.Module):
    """Counts of n-grams of letters, hashed into a vector of unit length (scikit-learn's
    HashingVectorizer).

    It knows which texts share words or parts of words, in any script, and nothing of their meaning.
    It needs no model and reads texts of any length in whole.
    """

    class Config(BaseModel, extra="forbid"):
        dim: int = Field(1024, ge=2, le=2**20, description="Dimensions of the vector.")
        shortest: int = Field(2, ge=1, description="Letters of the shortest n-grams.")
        longest: int = Field(4, ge=1, description="Letters of the longest n-grams.")

        @model_validator(mode="after")
        def _ordered(self) -> "Hashing.Config":
            if self.shortest > self.longest:
                raise ValueError("shortest is more than longest")
            return self

    libraries = ("scikit-learn",)
    frozen = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        from sklearn.feature_extraction.text import HashingVectorizer

        self.config = config
        self._vectorizer = HashingVectorizer(
            analyzer="char_wb",
            ngram_range=(config.shortest, config.longest),
            n_features=config.dim,
        )

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"char_wb {self.config.model_dump_json()}".encode()).hexdigest()

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns embeddings ``[texts, 1, dim]`` float32 and a mask ``[texts, 1]``."""
        mask = torch.ones(len(texts), 1, dtype=torch.bool)
        if not texts:
            return torch.zeros(0, 1, self.dim), mask
        counts = self._vectorizer.transform(texts).toarray()
        return torch.from_numpy(counts).float().unsqueeze(1), mask
