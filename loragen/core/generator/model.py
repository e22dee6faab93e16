"""A generator out of a checkpoint of its training: what a checkpoint tells beside the weights.

A generator: everything between a few prompts and an adapter, and the file that holds it.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from loragen.core.adapter.layout import Layout
from loragen.core.data.prompts import joined
from loragen.core.errors import DataError, LoragenError
from loragen.core.files import sha256_text, written_atomically
from loragen.core.generator.embeddings import Distance, Familiarity
from loragen.core.generator.generated import GeneratedAdapter, Merger, Origin
from loragen.core.generator.network import Network, Normalization, new_network
from loragen.core.generator.requests import draw_prompts, with_text
from loragen.core.plugins import create
from loragen.core.protocols import Encoder
from loragen.core.run.checkpoints import load_plain
from loragen.core.run.directory import CHECKPOINTS, experiment_name, generator_file

log = logging.getLogger(__name__)

KEY = "generator"
"""Of a checkpoint, beside Lightning's own keys."""
AVERAGED = "averaged.module."


def description(generator: "Generator", kept: nn.ModuleDict, total_steps: int) -> dict[str, Any]:
    """For the checkpoint of a training whose weights, averaged or not, are `kept` now.

    An encoder that trains along has moved since the prompts were last embedded, so that it is not
    known how far others are from them.
    """
    described = {**generator.description(), "total_steps": total_steps}
    if "encoder" in kept:
        encoder: Any = kept["encoder"]
        described |= {"encoder_fingerprint": encoder.fingerprint, "familiarity": None}
    return described


def is_checkpoint(document: dict[str, Any]) -> bool:
    return "pytorch-lightning_version" in document


def generator_document(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the generator's file would hold after the checkpoint's step.

    Raises DataError where it is not of `gen train`, or of one that did not describe them yet.
    """
    if KEY not in checkpoint:
        raise DataError(
            "not a checkpoint to generate with: it is of another training than `gen train`'s, or "
            "an earlier loragen's; go on with that (`gen train --resume`) or name a finished run"
        )
    state = checkpoint["state_dict"]
    averaged = AVERAGED if any(key.startswith(AVERAGED) for key in state) else ""
    return {
        **checkpoint[KEY],
        "state_dict": _part(state, f"{averaged}network."),
        "encoder_state": _part(state, f"{averaged}encoder.") or None,
    }


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


FORMAT_VERSION = 2
"""Version 1 had other networks, and no scale of the conditions."""


@dataclass(frozen=True)
class Choice:
    """A plugin and its validated options."""

    name: str
    options: dict[str, Any]


@dataclass
class Generator:
    """A trained decoder with all that it needs but the weights of a frozen encoder.

    Name, options and fingerprint identify the encoder, which is loaded when a prompt is first
    embedded; the weights of one that was trained along are here.
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
    network: Network
    encoder_state: dict[str, Tensor] | None = None
    """The encoder's weights where they were trained along; None where it is frozen."""
    familiarity: Familiarity | None = None
    """How far prompts are from the training; None in a file of format 1."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Of plain data: sources, plugins with distribution and version, training metrics."""
    name: str = "unnamed"
    """The experiment it was loaded from, or its file."""
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        """In a line: it holds a network."""
        values, datasets = self.layout.values, len(self.datasets)
        return (
            f"<Generator {self.name}: adapters of {values:,} values for {self.base_model}, "
            f"learned from {datasets} datasets>"
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        draws: int = 1,
        prompts_per_draw: int | None = None,
        seed: int = 0,
    ) -> GeneratedAdapter:
        """The adapter for these prompts, each tensor in the dtype of the training adapters.

        All prompts are read at once; or `prompts_per_draw` of them at random, `draws` times, and
        the mean of what these make is taken. That mean is of A and of B, token by token, as the
        decoder writes them: the mean of the products ΔW = BA would have up to `draws` times the
        rank and be no adapter of this shape. Since one decoder writes all draws, they share a
        basis, and the two means are close while the draws agree.

        Raises UsageError where no prompt has text or the draws cannot be made, LoragenError where
        the encoder is not the one of the training.
        """
        given = with_text(prompts)
        chosen = draw_prompts(given, draws, prompts_per_draw, seed, self.usual_prompts)
        tokens = torch.zeros(self.layout.tokens, self.layout.token_dim)
        distances: list[Distance] = []
        for drawn in chosen:
            condition, mask = self.embed(drawn)
            tokens += self._tokens(condition, mask) / len(chosen)
            if self.familiarity:
                distances.append(self.familiarity.distance(condition, mask))
        origin = replace(
            self._origin(given, distances),
            draws=draws,
            prompts_per_draw=len(chosen[0]),
            seed=None if len(chosen[0]) == len(given) else seed,
        )
        return GeneratedAdapter(dict(self.adapter_config), self.layout.unpack(tokens), origin)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> the condition ``[texts, positions, dim]`` and its mask; the texts are made of
        `samples_per_prompt` prompts each."""
        return self.text_encoder(joined(prompts, self.samples_per_prompt))

    @property
    def usual_prompts(self) -> int:
        """How many prompts made a condition in training."""
        return self.prompts_per_condition * self.samples_per_prompt

    @cached_property
    def text_encoder(self) -> Encoder:
        """Loaded once, with the weights of the training where it was trained along. Raises
        LoragenError where a frozen one has other weights than in training."""
        encoder: Encoder = create("encoder", self.encoder.name, self.encoder.options)
        if self.encoder_state is not None:
            try:
                cast(nn.Module, encoder).load_state_dict(self.encoder_state)
            except RuntimeError as error:
                raise LoragenError(
                    f"the encoder {self.encoder.name} {self.encoder.options} has other shapes than "
                    "the one this generator was trained with"
                ) from error
        if encoder.fingerprint != self.encoder_fingerprint:
            raise LoragenError(
                f"the encoder {self.encoder.name} {self.encoder.options} has other weights than "
                "the one this generator was trained with; its conditions would mean nothing"
            )
        return encoder

    @torch.inference_mode()
    def _tokens(self, condition: Tensor, mask: Tensor) -> Tensor:
        """``[tokens, token_dim]``, in the adapter's own units."""
        self.network.eval()
        normalized = self.network(condition.unsqueeze(0), mask.unsqueeze(0)).squeeze(0)
        return self.normalization.denormalize(normalized)

    def _origin(self, prompts: Sequence[str], distances: Sequence[Distance]) -> Origin:
        """Of several draws, the median distance."""
        middle = sorted(distances, key=lambda d: d.ratio)[(len(distances) - 1) // 2 :][:1]
        return Origin(
            generator=self.name,
            format_version=self.format_version,
            base_model=self.base_model,
            encoder=self.encoder.name,
            decoder=self.decoder.name,
            prompts=len(prompts),
            prompts_sha256=sha256_text(*prompts),
            plugins=[
                plugin
                for plugin in self.provenance.get("plugins", [])
                if plugin["kind"] in ("encoder", "decoder")
            ],
            datasets=self.datasets,
            nearest_dataset=middle[0].nearest if middle else None,
            distance=middle[0].ratio if middle else None,
            far=bool(middle) and middle[0].far,
            vague=bool(middle) and middle[0].vague,
        )

    @property
    def datasets(self) -> list[str]:
        """The names of the training datasets, or of their runs where only these are known."""
        if self.familiarity:
            return self.familiarity.datasets
        places = [Path(source) for source in self.provenance.get("sources", [])]
        return [(p.parent if p.name == CHECKPOINTS else p).name for p in places]

    def save(self, file: str | Path) -> None:
        """A file that `torch.load(file, weights_only=True)` reads."""
        document = {
            **self.description(),
            "state_dict": _on_cpu(self.network.state_dict()),
            "encoder_state": _on_cpu(self.encoder_state) if self.encoder_state else None,
        }
        with written_atomically(Path(file)) as temporary:
            torch.save(document, temporary)

    def description(self) -> dict[str, Any]:
        """All that a file holds but the trained weights: tensors and plain data."""
        return {
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
            "familiarity": self.familiarity.state() if self.familiarity else None,
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, path: str | Path) -> "Generator":
        """Of an experiment directory or its generator_model.pt; before its training has ended, of
        its best checkpoint, with a warning, or of the one named.

        Raises UsageError where there is none, DataError for a file that is not a generator of a
        format this version reads.
        """
        file = generator_file(Path(path))
        document, name = load_plain(file), experiment_name(file)
        try:
            if is_checkpoint(document):
                step, document = document["global_step"], generator_document(document)
                done = f"step {step} of {document['total_steps']}"
                log.warning("%s: an unfinished generator, at %s of its training", file, done)
                name += f" ({done})"
            version = document["format_version"]
            if version < FORMAT_VERSION:
                raise DataError(f"format {version} is an earlier loragen's; train it again")
            if version > FORMAT_VERSION:
                raise DataError(f"format {version} is newer than this loragen; upgrade it")
            return cls._from_document(document, name)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except KeyError as error:
            raise DataError(f"{file}: not a generator file: it has no {error}") from error
        except (RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{file}: not a generator file: {reason}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any], name: str) -> "Generator":
        decoder, layout = Choice(**document["decoder"]), Layout.from_state(document["layout"])
        network = new_network(decoder.name, decoder.options, document["condition_dim"], layout)
        try:
            network.load_state_dict(document["state_dict"])
        except RuntimeError as error:
            written = "".join(
                f", of {plugin['distribution']} {plugin['version']}"
                for plugin in document["provenance"].get("plugins", [])
                if plugin["kind"] == "decoder"
            )
            raise DataError(
                f"not a generator file of this version: its weights (format "
                f"{document['format_version']}) are of another decoder {decoder.name} than the one "
                f"installed; train it again, or use the decoder it was written with{written}"
            ) from error
        kept = (
            "encoder_fingerprint",
            "condition_dim",
            "adapter_config",
            "base_model",
            "samples_per_prompt",
            "prompts_per_condition",
            "provenance",
            "format_version",
        )
        known = document.get("familiarity")
        return cls(
            encoder=Choice(**document["encoder"]),
            decoder=decoder,
            layout=layout,
            normalization=Normalization(**document["normalization"]),
            network=network.eval(),
            encoder_state=document.get("encoder_state"),
            familiarity=Familiarity(**known) if known else None,
            name=name,
            **{key: document[key] for key in kept},
        )


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in state.items()}


@dataclass(frozen=True)
class Generated:
    """What was written, and how long it took."""

    path: Path
    values: int
    origin: Origin
    seconds: float
    """From prompts to files; the encoder and the generator were loaded before."""


def infer(
    generator: Generator,
    prompts: Sequence[str],
    output: Path,
    *,
    draws: int = 1,
    prompts_per_draw: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    merger: Merger | None = None,
) -> Generated:
    """Writes the adapter that the generator makes of the prompts, as `GeneratedAdapter.save` does;
    with a `merger`, the base with the adapter in it.

    Raises UsageError where no prompt has any text or `output` exists already.
    """
    _ = generator.text_encoder  # loading is not generating
    started = time.perf_counter()
    adapter = generator.generate(prompts, draws, prompts_per_draw, seed)
    if merger:
        merger.save(adapter, output, overwrite)
    else:
        adapter.save(output, overwrite)
    seconds = time.perf_counter() - started
    return Generated(output, generator.layout.values, adapter.origin, round(seconds, 4))
