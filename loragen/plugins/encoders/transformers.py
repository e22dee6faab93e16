"""Hidden states of any Hugging Face model: an encoder, an encoder-decoder, or a language model."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from loragen.core.errors import UsageError
from loragen.plugins.encoders.reading import ReadingEncoder, directory_or_hub_id, loading


class Transformers(ReadingEncoder):
    """Embeddings from any model of transformers: BERT, T5, a language model, the base model itself.

    Of an encoder-decoder the encoder is used alone. A language model's first token has seen nothing
    of the text, and in many layers its hidden state is a hundred times as large as others: the mean
    leaves it out. Texts beyond the model's maximum length are
    truncated at their end, which is warned of once.
    """

    class Config(BaseModel, extra="forbid"):
        model: str = Field(description="A hub id or a directory, such as that of the base model.")
        layer: int = Field(
            -1, description="The hidden state: 0 the embeddings, 1 the first layer's, -1 the last."
        )
        pooling: Literal["mean", "last", "cls", "tokens"] = Field(
            "mean",
            description="One embedding per text: the mean, the last or the first token's (BERT's "
            "[CLS]); or one per token.",
        )
        frozen: bool = Field(
            True, description="Keep the weights; false trains them with the decoder."
        )
        dtype: Literal["float32", "bfloat16"] = Field(
            "float32", description="In which the model computes; bfloat16 has half the memory."
        )
        max_length: int | None = Field(
            None, ge=1, description="Tokens of a text that are read; null: the model's limit."
        )
        max_tokens: int = Field(
            64, ge=1, description="Maximum positions of a text with pooling: tokens (tokens)."
        )
        batch_size: int = Field(32, ge=1, description="Texts per forward pass.")

        @model_validator(mode="after")
        def _trains_in_float32(self) -> "Transformers.Config":
            if not self.frozen and self.dtype != "float32":
                raise ValueError("an encoder that trains (frozen: false) has dtype float32")
            return self

    libraries = ("transformers",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from transformers import AutoModel, AutoTokenizer

        source = directory_or_hub_id(config.model)
        with loading(config.model, source) as local:
            kept: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, **kept)
            dtype = getattr(torch, config.dtype)
            model: Any = AutoModel.from_pretrained(source, dtype=dtype, **kept)
        self._shape = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        states = self._shape.num_hidden_layers + 1
        if not -states <= config.layer < states:
            raise UsageError(
                f"encoder {config.model}: layer {config.layer}: it has {states - 1} layers, "
                f"-{states} to {states - 1}"
            )
        self.model = model.requires_grad_(not config.frozen).eval()
        self._limit = self._most_tokens()
        self._causal = self._reads_forwards()
        if self._causal and config.pooling == "cls":
            raise UsageError(
                f"encoder {config.model}: pooling cls: its first token has seen "
                "nothing of the text, because it reads from left to right; mean or last has"
            )
        if not config.frozen:
            self._freeze_what_is_unused()

    @property
    def dim(self) -> int:
        return int(self._shape.hidden_size)

    @property
    def limit(self) -> int | None:
        return self._limit

    def _most_tokens(self) -> int | None:
        known = [
            self.config.max_length,
            self.tokenizer.model_max_length,
            getattr(self._shape, "max_position_embeddings", None),
        ]
        for name, module in self.model.named_modules():
            # RoBERTa counts positions from after the padding's.
            of_positions = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
            if of_positions and module.padding_idx is not None:
                known.append(module.num_embeddings - module.padding_idx - 1)
        # A tokenizer without a limit says 10^30, T5 -1.
        return min((n for n in known if n and 0 < n < 10**9), default=None)

    @property
    def batch_size(self) -> int:
        return int(self.config.batch_size)

    def embed(self, texts: Sequence[str], count: bool) -> tuple[list[Tensor], list[int]]:
        tokenizer, limit, cut = self.tokenizer, self.limit, list[int]()
        rows = tokenizer(list(texts), verbose=False)["input_ids"]
        for index, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                cut += [len(row)] if count else []
                short = tokenizer(texts[index], truncation=True, max_length=limit)
                rows[index] = short["input_ids"]
        # An empty text has no tokens where a tokenizer adds none.
        padding = tokenizer.pad_token_id or 0
        ids = [torch.tensor(row or [tokenizer.eos_token_id or padding]) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        batch = nn.utils.rnn.pad_sequence(ids, True, padding)
        mask = torch.arange(batch.shape[1]) < lengths[:, None]
        hidden = self._hidden(batch, mask)  # [texts, tokens, dim]
        valid = [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]
        match self.config.pooling:
            case "mean":
                skipped = [int(self._causal and len(row) > 1) for row in valid]
                pairs = zip(valid, skipped, strict=True)
                return [row[first:].float().mean(0, keepdim=True) for row, first in pairs], cut
            case "last":
                return [row[-1:].float() for row in valid], cut
            case "cls":
                return [row[:1].float() for row in valid], cut
        return [row[: self.config.max_tokens].float() for row in valid], cut

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        device = self.model.device
        last = self.config.layer in (-1, self._shape.num_hidden_layers)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device).long(),
            output_hidden_states=not last,  # which keeps all of them in memory
        )
        return output.last_hidden_state if last else output.hidden_states[self.config.layer]

    @torch.no_grad()
    def _reads_forwards(self) -> bool:
        """Returns whether a token sees none of those that follow, as in a language model."""
        ids = torch.tensor([[2, 3], [2, 4]], device=self.model.device)
        hidden = self.model(input_ids=ids).last_hidden_state
        return bool(torch.equal(hidden[0, 0], hidden[1, 0]))

    def _freeze_what_is_unused(self) -> None:
        """Freezes what no gradient reaches, such as a pooler or layers above the chosen one: DDP
        would wait for their gradients."""
        rows, _ = self.embed(["a"], count=False)
        rows[0].sum().backward()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
