"""A generator: everything between a few prompts and an adapter, and the file that holds it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragen.core.adapters import Adapter
from loragen.core.checkpoints import load_plain
from loragen.core.data.prompts import joined
from loragen.core.errors import DataError, LoragenError
from loragen.core.files import written_atomically
from loragen.core.generator.layout import Layout
from loragen.core.generator.normalization import Normalization
from loragen.core.plugins import create
from loragen.core.protocols import Encoder

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Choice:
    """A plugin and its validated options."""

    name: str
    options: dict[str, Any]


@dataclass
class Generator:
    """A trained decoder with all that it needs but the encoder's weights.

    The encoder is frozen: its name, options and fingerprint identify it.
    """

    encoder: Choice
    encoder_fingerprint: str
    decoder: Choice
    condition_dim: int
    layout: Layout
    normalization: Normalization
    adapter_config: dict[str, Any]
    base_model: str
    samples_per_prompt: int
    prompts_per_condition: int
    network: nn.Module
    provenance: dict[str, Any] = field(default_factory=dict)
    """Of plain data: sources, plugins with distribution and version, training metrics."""

    @torch.inference_mode()
    def generate(self, encoder: Encoder, prompts: Sequence[str]) -> Adapter:
        """The adapter for these prompts, in their own dtype; the base model is not needed."""
        condition, mask = encoder(joined(prompts, self.samples_per_prompt))
        return self.generate_from(condition, mask)

    @torch.inference_mode()
    def generate_from(self, condition: Tensor, mask: Tensor) -> Adapter:
        """The adapter for embedded prompts: ``[texts, positions, dim]`` and their mask."""
        self.network.eval()
        normalized = self.network(condition.unsqueeze(0), mask.unsqueeze(0)).squeeze(0)
        tokens = self.normalization.denormalize(normalized)
        return Adapter(dict(self.adapter_config), self.layout.unpack(tokens))

    def load_encoder(self) -> Encoder:
        """Raises LoragenError where the installed encoder has other weights than in training."""
        encoder: Encoder = create("encoder", self.encoder.name, self.encoder.options)
        if encoder.fingerprint != self.encoder_fingerprint:
            raise LoragenError(
                f"the encoder {self.encoder.name} {self.encoder.options} has other weights than "
                "the one this generator was trained with; its conditions would mean nothing"
            )
        return encoder

    def save(self, file: Path) -> None:
        """A file that `torch.load(file, weights_only=True)` reads."""
        document = {
            "format_version": FORMAT_VERSION,
            "encoder": {"name": self.encoder.name, "options": self.encoder.options},
            "encoder_fingerprint": self.encoder_fingerprint,
            "decoder": {"name": self.decoder.name, "options": self.decoder.options},
            "condition_dim": self.condition_dim,
            "layout": self.layout.state(),
            "normalization": {"mean": self.normalization.mean, "scale": self.normalization.scale},
            "adapter_config": self.adapter_config,
            "base_model": self.base_model,
            "samples_per_prompt": self.samples_per_prompt,
            "prompts_per_condition": self.prompts_per_condition,
            "state_dict": {k: v.detach().cpu() for k, v in self.network.state_dict().items()},
            "provenance": self.provenance,
        }
        with written_atomically(file) as temporary:
            torch.save(document, temporary)

    @classmethod
    def load(cls, file: Path) -> "Generator":
        """Raises DataError for a file that is not a generator of a format this version reads."""
        document = load_plain(file)
        try:
            version = document["format_version"]
            if version > FORMAT_VERSION:
                raise DataError(f"{file}: format {version} is newer than this loragen; upgrade it")
            return cls._from_document(document)
        except KeyError as error:
            raise DataError(f"{file}: not a generator file: it has no {error}") from error
        except (RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{file}: not a generator file: {reason}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> "Generator":
        decoder, layout = Choice(**document["decoder"]), Layout.from_state(document["layout"])
        network = create(
            "decoder", decoder.name, decoder.options, document["condition_dim"], layout.grid()
        )
        network.load_state_dict(document["state_dict"])
        kept = (
            "encoder_fingerprint",
            "condition_dim",
            "adapter_config",
            "base_model",
            "samples_per_prompt",
            "prompts_per_condition",
            "provenance",
        )
        return cls(
            encoder=Choice(**document["encoder"]),
            decoder=decoder,
            layout=layout,
            normalization=Normalization(**document["normalization"]),
            network=network.eval(),
            **{key: document[key] for key in kept},
        )
