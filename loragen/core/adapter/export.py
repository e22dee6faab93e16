"""Exports adapters for use without loragen: as a PEFT directory, or merged into the base model."""

import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from loragen.core.adapter import CARD, merged_record, write_merged_marker
from loragen.core.adapter.checks import check_finite, warn_of_config
from loragen.core.adapter.files import (
    PEFT_ERRORS,
    Adapter,
    attach_adapter,
    write_adapter,
)
from loragen.core.base.load import LanguageModel, load_base, tokenizer_in
from loragen.core.base.names import absolute_base, hub_id, is_gguf, resolve_base
from loragen.core.config import DEMO
from loragen.core.data.chat import end_ids
from loragen.core.errors import LoragenError, UsageError, first_line, shortened
from loragen.core.files import user_path, write_text
from loragen.core.hub import PLACE, base_name
from loragen.core.outputs import written_directory

log = logging.getLogger(__name__)

HUB = "https://huggingface.co/"


def prepare_export(
    adapter: Adapter, origin: Path, base_model: str | None, alpha: float | None
) -> Adapter:
    """Returns the adapter with `base_model` and `alpha`, if given, instead of its own, and with a
    name of the base that transformers resolves from any directory of this machine.

    Raises UsageError if the base is neither recorded nor given, DataError for NaN or infinity.
    """
    check_finite(adapter.tensors, origin)
    config = dict(adapter.config)
    if alpha is not None:
        if (method := config.get("peft_type", "LORA")) != "LORA":
            raise UsageError(f"{origin}: --alpha is for LoRA; its peft_type is {method}")
        config["lora_alpha"] = alpha
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{origin}: its base model is not recorded; give --base-model")
    config["base_model_name_or_path"] = _resolvable(name)
    return replace(adapter, config=config)


def export_adapter(
    adapter: Adapter, source: Path, output: Path, license_id: str | None = None
) -> None:
    """Writes a PEFT directory, atomically, with the tokenizer that lies beside the adapter, if one
    does."""
    warn_of_config(adapter.config, source)
    card = export_card(adapter, source, license_id=license_id)
    write_adapter(output, adapter, card, own_tokenizer(adapter))


def export_merged(
    adapter: Adapter,
    source: Path,
    output: Path,
    trust_remote_code: bool = False,
    license_id: str | None = None,
) -> None:
    """Writes the base model with the adapter merged in, in the base's stored dtype, and its
    tokenizer. The merge is computed in float32, by PEFT.

    Raises LoragenError if the adapter does not fit the base or cannot be merged.
    """
    name = adapter.config["base_model_name_or_path"]
    base = load_base(name, torch.float32, trust_remote_code=trust_remote_code)
    model = attach_adapter(base.model, adapter, str(source))
    with written_directory(output, merged_record) as temporary:
        merged, tokenizer = _merged(model, base.dtype, str(source)), tokenizer_of(adapter, base)
        with _stopping(merged, tokenizer):
            merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _let_others_read(temporary)
        write_text(temporary / CARD, export_card(adapter, source, True, license_id))
        document = {"adapter": str(source), "base_model": name, "loragen": version("loragen")}
        write_merged_marker(temporary, document)


def save_merged(model: Any, base: LanguageModel, directory: Path) -> None:
    """Saves a `PeftModel` as a Hugging Face model directory: the adapter merged into the base, in
    the base's stored dtype, and the tokenizer. `model` is unchanged.

    Raises LoragenError for a result with NaN or infinity.
    """
    plain = model.get_base_model()
    kept = plain.config.dtype, plain.config.tie_word_embeddings
    if any(
        hasattr(layer, "get_delta_weight")
        for layer in (plain.get_input_embeddings(), plain.get_output_embeddings())
    ):
        plain.config.tie_word_embeddings = False
    try:
        with _stopping(plain, base.tokenizer):
            plain.save_pretrained(directory, state_dict=merged_state(model, base.dtype))
        plain.config.dtype = base.dtype  # save_pretrained writes the dtype of the model in memory
        plain.config.save_pretrained(directory)
    finally:
        plain.config.dtype, plain.config.tie_word_embeddings = kept
    base.tokenizer.save_pretrained(directory)
    _let_others_read(directory)


def _let_others_read(directory: Path) -> None:
    """Gives the weights the usual permissions; safetensors lets only the owner read them."""
    usual = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(usual)


def _merged(model: Any, dtype: torch.dtype, origin: str) -> Any:
    """Merges any kind of adapter into its base, in place, and returns the base in `dtype`.

    A weight that several modules share gets a copy first where an adapter changes one of them: PEFT
    would add all changes to all of them. Raises LoragenError for an adapter that cannot be merged,
    and for a result with NaN or infinity.
    """
    config = model.peft_config["default"]
    replicated = getattr(config, "layer_replication", None)  # then layers share all weights
    modules = list(model.get_base_model().modules())
    users = Counter(id(weight) for one in modules for weight in one.parameters(recurse=False))
    for module in modules:
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if layer is not module or replicated:
            for name, weight in list(layer.named_parameters(recurse=False)):
                if users[id(weight)] > 1:
                    setattr(layer, name, torch.nn.Parameter(weight.clone(), requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = model.merge_and_unload(safe_merge=True).to(dtype)
        except PEFT_ERRORS as error:
            raise LoragenError(f"{origin}: PEFT cannot merge it: {first_line(error)}") from None
    for name, weight in base.named_parameters():
        if not torch.isfinite(weight).all():
            raise LoragenError(f"{origin}: {_overflow(name, dtype)}")
    last = base.get_output_embeddings()
    if last is not None and base.config.tie_word_embeddings:
        if last.weight.equal(base.get_input_embeddings().weight):
            base.tie_weights()
        else:
            base.config.tie_word_embeddings = False
    return base


@contextmanager
def _stopping(model: Any, tokenizer: Any) -> Iterator[None]:
    """Adds the token that ends learned answers to those at which the model's `generate` stops,
    within the context: it may not be the tokenizer's own."""
    settings = getattr(model, "generation_config", None)
    shipped = getattr(settings, "eos_token_id", None)
    several = shipped if isinstance(shipped, list) else [shipped]
    if settings is None or set(end_ids(tokenizer)) <= set(several):
        yield
        return
    settings.eos_token_id = sorted(
        {*end_ids(tokenizer), *(one for one in several if one is not None)}
    )
    try:
        yield
    finally:
        settings.eos_token_id = shipped


def merged_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the base's state dict with ΔW = alpha / r · B A added, in `dtype`.

    `model` is unchanged. PEFT's own merge would change the base in place, and unmerging does not
    restore it exactly. One layer is merged at a time, since all ΔW are as large as the model.
    """
    layers = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    state: dict[str, torch.Tensor] = {}
    unchanged: dict[Any, torch.Tensor] = {}  # tied weights stay one tensor, which is saved once
    for key, value in model.get_base_model().state_dict().items():
        if "lora_" in key:
            continue
        layer = layers.get(key)
        if layer is None:
            own = value.data_ptr(), value.shape, value.stride()
            if own not in unchanged:
                unchanged[own] = value.to(dtype).cpu()
            converted = unchanged[own]
        else:
            converted = (value + layer.get_delta_weight("default").to(value)).to(dtype).cpu()
            if not torch.isfinite(converted).all():
                raise LoragenError(_overflow(key.replace(".base_layer.", "."), dtype))
        state[key.replace(".base_layer.", ".")] = converted
    return state


def _overflow(name: str, dtype: torch.dtype) -> str:
    return f"merged into {dtype}, {name} has NaN or infinity"


def tokenizer_of(adapter: Adapter, base: LanguageModel) -> Any:
    """Returns the tokenizer that lies beside an adapter, such as one with new tokens, else that of
    its base."""
    own = own_tokenizer(adapter)
    if own is None:
        return base.tokenizer
    log.info("%s: its own tokenizer is used", adapter.directory)
    return own


def own_tokenizer(adapter: Adapter) -> Any | None:
    """Returns the tokenizer that lies beside an adapter, if one does."""
    directory = adapter.directory
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return None
    return tokenizer_in(directory)


def _resolvable(name: str) -> str:
    """Returns the path or hub id by which plain transformers and PEFT find a base model."""
    with suppress(UsageError):  # a path of another machine; the adapter can be written
        return absolute_base(resolve_base(name))
    return name


def export_card(
    adapter: Adapter,
    source: Path,
    merged: bool = False,
    license_id: str | None = None,
    command: str = "lora export",
) -> str:
    """Returns the README.md of an adapter that a command writes in place of the `source`, by whose
    name it is called."""
    config, base = adapter.config, adapter.config["base_model_name_or_path"]
    method = config.get("peft_type", "LORA")
    kind = f"An adapter ({method})"
    if method == "LORA":
        kind = f"A LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']:g})"
    lineage = adapter.lineage
    tags = ("generated",) if lineage.get("command") == "gen infer" else ()
    front = front_matter(base, merged, tags, hub_datasets(lineage), license_id)
    plain = {k: v for k, v in lineage.items() if isinstance(v, str | int | float) and v != ""}
    lines = "".join(f"- **{key}**: {shortened(str(v), 120)}\n" for key, v in plain.items())
    made = f"## Lineage\n\n{lines}\n" if lines else ""
    card = (
        f"{front}\n# {base_name(source.absolute())}\n\n{kind} "
        f"{'merged into' if merged else 'for'} {describe_base(base)}, written by "
        f"`loragen {command}`.\n\n{made}"
        f"{how_to_load(base, merged, adapter.chat_template_kwargs)}"
    )
    if base == _resolvable(DEMO) and not merged:
        card += (
            "\nThat base is the tiny one that ships with loragen, in `loragen/demo/base` of the "
            "installed package.\n"
        )
    return card


# ---------------------------------------------------------------------------- model cards


def front_matter(
    base_model: str,
    merged: bool = False,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    license_id: str | None = None,
) -> str:
    """Returns the metadata of a model card (README.md), in the hub's format.

    The hub expects a hub id as `base_model`: that of the base, or the one that a GGUF file says it
    was made from. A path or `demo` would be a broken link there. The licence, if none is given, is
    that of the base, as far as it is on this machine.
    """
    linked = hub_id(base_model)
    if is_gguf(base_model):
        linked = hub_id(_record(base_model).get("repository", "").removeprefix(HUB))
    relation = "finetune" if merged else "adapter"
    given: dict[str, str | list[str]] = {}
    if linked:
        given |= {"base_model": linked, "base_model_relation": relation}
    if datasets:
        given["datasets"] = list(datasets)
    given["library_name"] = "transformers" if merged else "peft"
    if found := license_id or _license_of(base_model):
        given["license"] = found
    given["pipeline_tag"] = "text-generation"
    derived = [f"base_model:{relation}:{linked}"] if linked else []
    given["tags"] = [*derived, "lora", "loragen", *tags]
    ours = ("base_model_relation", "library_name", "pipeline_tag")
    # JSON is YAML, and no id is read as a number or a date.
    lines = "".join(
        f"{key}: {value if key in ours else json.dumps(value)}\n" for key, value in given.items()
    )
    return f"---\n{lines}---\n"


def _license_of(base_model: str) -> str | None:
    """Returns the id of a base's licence: what a GGUF file says, or the card in its directory or in
    the hub's cache; None if there is none that the hub would know."""
    if is_gguf(base_model):
        found: Any = _record(base_model).get("license")
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.repocard import metadata_load

        card: Any = user_path(base_model) / CARD
        if hub_id(base_model):
            card = try_to_load_from_cache(base_model, CARD)
        found = None
        with suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            found = (metadata_load(card) or {}).get("license")
    is_id = isinstance(found, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", found)
    return found if is_id else None


def hub_datasets(lineage: Mapping[str, Any]) -> list[str]:
    """Returns the hub's ids of the datasets in the lineage of an adapter; others would be broken
    links on a card."""
    found = str(lineage.get("hub_dataset", ""))
    return [found] if hub_id(found) else []


def describe_base(base_model: str) -> str:
    """Returns the name of a base for a model card, without the path of a local one; of a GGUF file
    also what its metadata say."""
    if not is_gguf(base_model):
        own = base_model == DEMO or hub_id(base_model)
        return base_model if own else f"the base in the directory {_local_name(base_model)}"
    record = {key: shortened(text, 120) for key, text in _record(base_model).items()}
    says = [
        record[key] for key in ("name", "organization", "license", "repository") if key in record
    ]
    if "base_model" in record:
        says.append(f"tuned from {record['base_model']}")
    origin = f"; its metadata: {', '.join(says)}" if says else ""
    digest = f", sha256 {record['sha256']}" if record else ""
    return f"{_local_name(base_model)} (a GGUF file, dequantised to float32{digest}{origin})"


def how_to_load(
    base_model: str, merged: bool = False, kwargs: Mapping[str, Any] | None = None
) -> str:
    """Returns the section of a model card that loads the adapter without loragen. `kwargs` is what
    the chat template was given in training."""
    given = ""
    if kwargs:
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        given = f"""
In training, the chat template was given {arguments}. Give it the same:
`tokenizer.apply_chat_template(messages, add_generation_prompt=True, {arguments})`, or for a server
`"chat_template_kwargs": {json.dumps(kwargs, default=str)}` in the request.
"""
    if merged:
        return f"""## How to load it

The adapter is merged into the base model's weights:
`AutoModelForCausalLM.from_pretrained("{PLACE}")`.
{given}"""
    imports, base, note = "PeftModel", f"from_pretrained({json.dumps(base_model)})", ""
    config = f'PeftConfig.from_pretrained("{PLACE}")'
    before = ""
    if base_model == DEMO:
        before = "from loragen.core.base.names import resolve_base\n"
        base = f'from_pretrained(resolve_base("{DEMO}"))'
        note = """
The base `demo` is the tiny model that ships with loragen; `resolve_base` returns its path.
`loragen lora export DIRECTORY --output OTHER` writes an adapter with that path in it.
"""
    elif is_gguf(base_model):
        imports, before = "PeftConfig, PeftModel", "from pathlib import Path\n\n"
        base = 'from_pretrained(file.parent, gguf_file=file.name, dtype="float32")'
        config = f"file = Path({config}.base_model_name_or_path)\n"
        note = """
transformers reads the GGUF file with the package gguf. The weights that the file was quantised from
are another base: `loragen lora export DIRECTORY --output OTHER --base-model OWNER/NAME` writes the
adapter for them, without any change of its values.
"""
    elif not hub_id(base_model):
        imports, base = "PeftConfig, PeftModel", "from_pretrained(config.base_model_name_or_path)"
        config = f"config = {config}\n"
        note = """
The base is a directory on the machine that made this adapter, and adapter_config.json has its path;
on another machine, put the path of a copy there.
"""
    return f"""## How to load it

```python
{before}from peft import {imports}
from transformers import AutoModelForCausalLM

{config if "Config" in imports else ""}base = AutoModelForCausalLM.{base}
model = PeftModel.from_pretrained(base, "{PLACE}")
```
{note}{given}"""


def _local_name(path: str) -> str:
    """Returns the last part of a path, of this system or of another."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _record(gguf_file: str) -> dict[str, str]:
    from loragen.core.base.gguf import read_record

    return read_record(user_path(gguf_file))
