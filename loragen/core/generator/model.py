"""A generator: everything between prompts and an adapter, and the file that stores it.

The file is written at the end of training. A checkpoint holds the same content (`describe` and the
weights), so that a generator can be loaded before its training has ended.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError
from torch import Tensor, nn

from loragen.core.adapter.checks import check_config, check_finite
from loragen.core.adapter.layout import Layout
from loragen.core.data.prompts import joined_texts
from loragen.core.errors import DataError, LoragenError, PluginError, counted, one_line
from loragen.core.files import sha256_text, written_atomically
from loragen.core.generator.collected import Collected
from loragen.core.generator.embeddings import Familiarity
from loragen.core.generator.generated import GeneratedAdapter, Origin
from loragen.core.generator.network import Network, Normalization, method, new_network
from loragen.core.generator.requests import draw_prompts, nonempty_prompts
from loragen.core.plugins import create
from loragen.core.protocols import Encoder, Transfers
from loragen.core.run.checkpoints import load_weights_only
from loragen.core.run.directory import (
    CHECKPOINTS,
    GENERATOR_FILE,
    MANIFEST,
    PluginRecord,
    SourceRecord,
    experiment_name,
    generator_file,
)

FORMAT_VERSION = 4
"""Version 1 did not standardise conditions. In version 2 the objective `transfer` trained parts of
`hyperconv` to combine principal directions. In version 3 `neighbours` stored its multi-task adapter
as one tensor."""
CHECKPOINT_KEY = "generator"
"""The key of a Lightning checkpoint that holds `Generator.describe_in_checkpoint`."""
AVERAGED = "averaged.module."
"""Prefix of the averaged weights in a checkpoint, if there are any."""
MAX_COEFFICIENTS = 5
"""The most coefficients that are stored with a generated adapter."""
ALL_DATASETS = "all datasets together"
"""The name of an adapter that is trained on all datasets, beside the names of datasets."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A plugin by name, with its validated options."""

    name: str
    options: dict[str, Any]


class _LayoutState(BaseModel):
    """The types of `Layout.state`."""

    token_dim: StrictInt = Field(gt=0)
    tensors: list[tuple[StrictStr, list[StrictInt], StrictStr]] = Field(min_length=1)


class _Provenance(BaseModel):
    """The types of what is read of the description of the training."""

    plugins: list[PluginRecord] = []
    sources: list[StrictStr] = []
    source_records: list[SourceRecord] = []
    trained_for: StrictStr = ""


class _Described(BaseModel):
    """The fields of a `Generator` that its file stores under their names, with their types."""

    encoder_fingerprint: StrictStr
    condition_dim: StrictInt = Field(gt=0)
    adapter_config: dict[str, Any]
    base_model: StrictStr
    samples_per_prompt: StrictInt = Field(gt=0)
    prompts_per_condition: StrictInt = Field(gt=0)
    provenance: _Provenance
    format_version: StrictInt


class _Content(_Described, arbitrary_types_allowed=True):
    """The types of the content of a generator's file, which may be damaged, or a stranger's."""

    encoder: Choice
    decoder: Choice
    layout: _LayoutState
    normalization: Normalization
    collected: StrictStr | None
    familiarity: Familiarity | None = None
    state_dict: dict[str, Tensor]
    encoder_state: dict[str, Tensor] | None = None


@dataclass
class Generator:
    """A trained decoder and all that it needs to generate, except the weights of a frozen encoder.

    A frozen encoder is identified by name, options and fingerprint, and loaded when a prompt is
    first embedded; the weights of an encoder that was trained are stored here.
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
    """The number of prompts that are joined into one text."""
    prompts_per_condition: int
    """The number of texts of a condition in training."""
    network: Network
    encoder_state: dict[str, Tensor] | None = None
    """The encoder's weights if they were trained; None if it is frozen."""
    collected: Collected | None = None
    """The adapters that the decoder combines, in a file of their own; None if it combines none."""
    familiarity: Familiarity | None = None
    """Computes the out-of-distribution score of prompts; None if that is not possible."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain data: sources, plugins with distribution and version, training metrics."""
    name: str = "unnamed"
    """The experiment that it was loaded from, or its file."""
    format_version: int = FORMAT_VERSION

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """What the chat template was given in the runs that it was trained on."""
        return dict(self.provenance.get("chat_template_kwargs") or {})

    def __repr__(self) -> str:
        values, datasets = self.layout.values, counted(len(self.datasets), "dataset")
        return (
            f"<Generator {self.name}: adapters of {values:,} values for {self.base_model}, "
            f"trained on {datasets}>"
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        draws: int = 1,
        prompts_per_draw: int | None = None,
        seed: int = 0,
    ) -> GeneratedAdapter:
        """Returns the adapter for these prompts, each tensor in the dtype of the training adapters.

        By default all prompts form one condition. Otherwise the result is the mean over `draws`
        random subsets of `prompts_per_draw` prompts. It is the mean of A and of B, token by token:
        the mean of the products ΔW = BA would have up to `draws` times the rank. Since one decoder
        generates all of them in a shared basis, the two means are close while the draws agree.

        Raises UsageError if no prompt has text or there are too few for the draws, LoragenError if
        the encoder is not the one of the training, DataError for NaN or infinity in the result.
        """
        given = nonempty_prompts(prompts)
        subsets = draw_prompts(given, draws, prompts_per_draw, seed, self.usual_prompts)
        tokens = torch.zeros(self.layout.tokens, self.layout.token_dim)
        distances, coefficients = [], []
        for subset in subsets:
            condition, mask = self.embed(subset)
            tokens += self._decode(condition, mask) / len(subsets)
            coefficients += self._coefficients(condition, mask)
            if self.familiarity:
                distances.append(self.familiarity.distance(condition, mask))
        distances.sort(key=lambda distance: distance.ratio)
        median = distances[(len(distances) - 1) // 2] if distances else None
        plugins = self.provenance.get("plugins", [])
        origin = Origin(
            generator=self.name,
            format_version=self.format_version,
            base_model=self.base_model,
            encoder=self.encoder.name,
            decoder=self.decoder.name,
            method=method(self.decoder.name),
            trained_for=self.provenance.get("trained_for", ""),
            coefficients=_largest(coefficients, self.datasets),
            prompts=len(given),
            prompts_sha256=sha256_text(*given),
            draws=draws,
            prompts_per_draw=len(subsets[0]),
            seed=None if len(subsets[0]) == len(given) else seed,
            plugins=[one for one in plugins if one["kind"] in ("encoder", "decoder")],
            datasets=self.datasets,
            nearest_dataset=median.nearest if median else None,
            distance=median.ratio if median else None,
            far=median is not None and median.far,
            vague=median is not None and median.vague,
            training_prompts=self.usual_prompts,
        )
        tensors = self.layout.unpack(tokens)
        check_finite(tensors, f"{self.name}: the generated adapter")
        return GeneratedAdapter(
            dict(self.adapter_config),
            tensors,
            origin,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns the condition of prompts, ``[texts, positions, dim]``, and its mask; each text
        joins `samples_per_prompt` prompts."""
        return self.text_encoder(joined_texts(prompts, self.samples_per_prompt))

    @torch.inference_mode()
    def _decode(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Returns the denormalised adapter, ``[tokens, token_dim]``."""
        self.network.eval()
        normalized = self.network(condition.unsqueeze(0), mask.unsqueeze(0)).squeeze(0)
        return self.normalization.denormalize(normalized)

    @torch.inference_mode()
    def _coefficients(self, condition: Tensor, mask: Tensor) -> list[Tensor]:
        """Returns one tensor, the coefficients ``[datasets]``, if the decoder has any."""
        found = self.network.coefficients(condition.unsqueeze(0), mask.unsqueeze(0))
        return [] if found is None else [found[0]]

    @property
    def mean_adapter(self) -> Tensor:
        """The mean of the collected adapters, ``[tokens, token_dim]``."""
        return self.collected.mean() if self.collected else self.normalization.mean

    @property
    def usual_prompts(self) -> int:
        """The number of prompts of a condition in training."""
        return self.prompts_per_condition * self.samples_per_prompt

    @property
    def datasets(self) -> list[str]:
        """The names of the training datasets, or of their runs if only those are known."""
        if self.familiarity:
            return self.familiarity.datasets
        paths = [Path(source) for source in self.provenance.get("sources", [])]
        return [(path.parent if path.name == CHECKPOINTS else path).name for path in paths]

    @cached_property
    def text_encoder(self) -> Encoder:
        """The encoder, loaded at first use, with its trained weights if it was trained. Raises
        LoragenError if its weights are not those of the training."""
        encoder: Encoder = create("encoder", self.encoder.name, self.encoder.options)
        which = f"encoder {self.encoder.name} {self.encoder.options}"
        if self.encoder_state is not None:
            try:
                cast(nn.Module, encoder).load_state_dict(self.encoder_state)
            except RuntimeError as error:
                raise LoragenError(
                    f"{which}: its shapes are not those of the encoder that this generator was "
                    "trained with; install that one"
                ) from error
        if encoder.fingerprint != self.encoder_fingerprint:
            raise LoragenError(
                f"{which}: it has other weights than the encoder that this generator was trained "
                "with; restore those"
            )
        return encoder

    def save(self, file: str | Path) -> None:
        """Writes a file that `torch.load(file, weights_only=True)` reads, and beside it, in
        `collected_file(file)`, the adapters that the decoder combines, if it does."""

        def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: tensor.detach().cpu() for key, tensor in state.items()}

        document = {
            **self.describe(),
            "state_dict": on_cpu(self.network.state_dict()),
            "encoder_state": on_cpu(self.encoder_state) if self.encoder_state else None,
        }
        if self.collected:  # first, so that the generator is complete once its file is there
            self.collected.save(collected_file(Path(file)))
        with written_atomically(Path(file)) as temporary:
            torch.save(document, temporary)

    def describe(self) -> dict[str, Any]:
        """Returns the content of the file without the trained weights: tensors and plain data."""
        return {
            **{name: getattr(self, name) for name in _Described.model_fields},
            "format_version": FORMAT_VERSION,
            "encoder": {"name": self.encoder.name, "options": self.encoder.options},
            "decoder": {"name": self.decoder.name, "options": self.decoder.options},
            "layout": self.layout.state(),
            "collected": self.collected.fingerprint if self.collected else None,
            "normalization": {"mean": self.normalization.mean, "scale": self.normalization.scale},
            "familiarity": dict(vars(self.familiarity)) if self.familiarity else None,
        }

    def describe_in_checkpoint(self, modules: nn.ModuleDict, total_steps: int) -> dict[str, Any]:
        """Returns `describe` for a checkpoint whose weights, averaged or not, are in `modules`.

        The out-of-distribution score is left out if the encoder is trained, because the encoder has
        changed since the prompts were embedded.
        """
        described = {**self.describe(), "total_steps": total_steps}
        if "encoder" in modules:
            encoder: Any = modules["encoder"]
            described |= {"encoder_fingerprint": encoder.fingerprint, "familiarity": None}
        return described

    @classmethod
    def load(cls, path: str | Path) -> "Generator":
        """Loads an experiment directory, its generator_model.pt, or a checkpoint of its training.

        If the training of an experiment has not ended, its best checkpoint is loaded. Loading a
        checkpoint logs a warning. Raises UsageError if there is no generator, DataError for a file
        that is not a generator of the format that this version reads.
        """
        file = generator_file(Path(path))
        document, name = load_weights_only(file), experiment_name(file)
        try:
            if "pytorch-lightning_version" in document:
                step, document = document["global_step"], _of_checkpoint(document)
                progress = f"step {step} of {document['total_steps']}"
                log.warning("%s: the training has not ended; loading %s", file, progress)
                name += f" ({progress})"
            version = document["format_version"]
            if version != FORMAT_VERSION:
                remedy = "train it again" if version < FORMAT_VERSION else "upgrade loragen"
                raise DataError(f"format {version}, expected format {FORMAT_VERSION}; {remedy}")
            return cls._from_document(document, name, collected_file(file))
        except (DataError, PluginError) as error:
            raise DataError(*(f"{file}: {problem}" for problem in error.problems)) from error
        except KeyError as error:
            raise DataError(f"{file}: not a generator file: it has no {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"{file}: not a generator file: {place}: {first['msg']}") from error
        except LoragenError:
            raise
        except Exception as error:  # reading what is no generator may raise anything
            raise DataError(f"{file}: not a generator file: {one_line(error)}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any], name: str, collected: Path) -> "Generator":
        for key, field_info in _Content.model_fields.items():
            if field_info.is_required() and key not in document:
                raise KeyError(key)  # which `load` says in one line
        content = _Content.model_validate(document)
        check_config(document["adapter_config"], "adapter_config")
        decoder, layout = content.decoder, Layout.from_state(document["layout"])
        normalization, familiarity = content.normalization, content.familiarity
        tokens, datasets = layout.tokens, len(familiarity.datasets) if familiarity else 0
        expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
            ("normalization.mean", normalization.mean, (tokens, layout.token_dim)),
            ("normalization.scale", normalization.scale, (tokens, 1)),
        ]
        if familiarity:
            width = content.condition_dim
            expected += [
                ("familiarity.centres", familiarity.centres, (datasets, width)),
                ("familiarity.noise", familiarity.noise, (datasets,)),
            ]
        for key, tensor, shape in expected:
            if tensor.shape != shape or not tensor.is_floating_point():
                found = f"{list(tensor.shape)} {tensor.dtype}"
                raise DataError(f"{key} is {found}, expected {list(shape)} torch.float32")
        network = new_network(decoder.name, decoder.options, document["condition_dim"], layout)
        adapters = None
        if document["collected"]:
            adapters = Collected.load(collected, normalization.scale, document["collected"])
            if isinstance(network.decoder, Transfers):
                network.decoder.use_adapters(adapters)
        try:
            network.load_state_dict(document["state_dict"])
        except RuntimeError as error:
            written_by = "".join(
                f" ({plugin['distribution']} {plugin['version']})"
                for plugin in document["provenance"].get("plugins", [])
                if plugin["kind"] == "decoder"
            )
            raise DataError(
                f"not a generator file of this version: its weights do not fit the installed "
                f"decoder {decoder.name}; train it again, or install the decoder that wrote it"
                f"{written_by}"
            ) from error
        return cls(
            encoder=content.encoder,
            decoder=decoder,
            layout=layout,
            normalization=normalization,
            network=network.eval(),
            collected=adapters,
            encoder_state=document.get("encoder_state"),
            familiarity=familiarity,
            name=name,
            **{key: document[key] for key in _Described.model_fields},
        )


def collected_file(file: Path) -> Path:
    """Returns the path of the adapters that a generator's decoder combines: beside the generator's
    file, of which a checkpoint belongs to the one of its experiment."""
    experiment = file.absolute().parent.parent
    if file.parent.name == CHECKPOINTS and (experiment / MANIFEST).is_file():
        file = experiment / GENERATOR_FILE
    return file.with_suffix(".collected.safetensors")


def _largest(coefficients: Sequence[Tensor], datasets: Sequence[str]) -> dict[str, float]:
    """Returns the mean over draws of the coefficients that are largest in size, at most five, by
    dataset, which may have several adapters. What they lack to 1 belongs to an adapter of all
    datasets (`Transfers`)."""
    if not coefficients:
        return {}
    mean = torch.stack(list(coefficients)).mean(0)
    total = {ALL_DATASETS: 1 - float(mean.sum())}
    for name, value in zip(datasets, mean.tolist(), strict=True):
        total[name] = total.get(name, 0.0) + value
    largest = sorted(total, key=lambda name: -abs(total[name]))[:MAX_COEFFICIENTS]
    found = {name: round(total[name], 3) for name in largest}
    return {name: share for name, share in found.items() if share or name != ALL_DATASETS}


def _of_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a generator's file after the checkpoint's step. Raises DataError if
    the checkpoint is of another training, or older than `describe_in_checkpoint`."""
    if CHECKPOINT_KEY not in checkpoint:
        raise DataError(
            "not a checkpoint of a generator: it is of another training than `gen train`, or of an "
            "earlier loragen; resume that (`gen train --resume`) or name a finished run"
        )
    state = checkpoint["state_dict"]
    averaged = AVERAGED if any(key.startswith(AVERAGED) for key in state) else ""

    def part(prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}

    return {
        **checkpoint[CHECKPOINT_KEY],
        "state_dict": part(f"{averaged}network."),
        "encoder_state": part(f"{averaged}encoder.") or None,
    }
