"""What servers make of an adapter: which refuse it, which scale it wrongly, and the form they take.

The rules are those of the servers' published sources (docs/serving.md names the files). PEFT
computes more kinds of LoRA than any of them; what a server does not know it refuses or, worse,
ignores without a word.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen.core.adapter import Server
from loragen.core.adapter.checks import (
    factor_keys,
    module_of,
    module_scaling,
    module_value,
    not_ba,
)
from loragen.core.adapter.files import Adapter
from loragen.core.errors import LoragenError

NAMES = dict(zip(Server, ("vLLM", "SGLang", "LoRAX", "llama.cpp"), strict=True))
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""The values of vLLM's --max-lora-rank that all versions since 0.9 take (newer ones also 1 and
320); an adapter's rank may be lower."""
OLD_FIELDS = (
    *("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r"),
    *("revision", "target_modules", "task_type"),
)
"""The fields of `LoraConfig` that every PEFT knows; an old one raises for any other."""
OTHER_FIELDS = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Fields without which a newer PEFT would give modules a LoRA that the adapter does not have."""


@dataclass(frozen=True)
class Obstacle:
    """What a server does not compute as PEFT does."""

    reason: str
    """What it makes of the adapter, after the server's name: `ignores alpha_pattern, ...`."""
    mended: bool
    """Whether the adapter's plain form (`for_server`) is free of it."""


def obstacles(adapter: Adapter) -> dict[Server, list[Obstacle]]:
    """Returns what stands in the way of each server; nothing for an adapter that all serve."""
    config, tensors = adapter.config, adapter.tensors
    if reason := not_ba(config, tensors):  # DoRA, modules_to_save, biases, other methods, PiSSA
        both = [Obstacle(f"refuses or ignores what is not s · B A ({reason})", False)]
        return {server: list(both) for server in NAMES}
    found: dict[Server, list[Obstacle]] = {server: [] for server in NAMES}

    def add(reason: str, *servers: Server, mended: bool = True) -> None:
        for server in servers:
            found[server].append(Obstacle(reason, mended))

    modules = [module_of(key) for key, _ in factor_keys(tensors)]
    ranks = {int(module_value(config, "r", module)) for module in modules}
    alphas = {module_value(config, "lora_alpha", module) for module in modules}
    rank = int(config["r"])
    if config.get("use_rslora"):
        add("ignores use_rslora and scales by alpha / r", Server.sglang, Server.llama_cpp)
    if alphas != {config["lora_alpha"]}:
        add("ignores alpha_pattern and scales by lora_alpha", *NAMES)
    if ranks != {rank}:
        add(
            "ignores rank_pattern and scales by the adapter's r",
            Server.vllm,
            Server.sglang,
            Server.lorax,
        )
    if max(ranks) > VLLM_RANKS[-1]:
        add(f"takes ranks up to {VLLM_RANKS[-1]}, not {max(ranks)}", Server.vllm, mended=False)
    if not _are_names(config.get("target_modules")):
        add("reads target_modules as a list of names without paths", Server.sglang)
    layers: dict[str, set[int]] = {}  # of each kind of module in layers
    for module in modules:
        numbers = [int(part) for part in module.split(".") if part.isdigit()]
        if numbers:
            layers.setdefault(module.rpartition(".")[2], set()).add(numbers[0])
    number = 1 + max((last for of_kind in layers.values() for last in of_kind), default=-1)
    if any(len(of_kind) < number for of_kind in layers.values()):
        add("leaves a kind of module out that not every layer has", Server.lorax, mended=False)
    return found


def _are_names(targets: object) -> bool:
    return isinstance(targets, list) and all("." not in str(name) for name in targets)


def for_server(adapter: Adapter, server: Server) -> Adapter:
    """Returns the adapter in the form that a server computes as PEFT does: one rank, one whole
    alpha, one list of target modules. Every scaling that differs is in B, and a matrix of a lower
    rank has rows of zeros. ΔW is the same, up to the rounding of B to its dtype; an adapter without
    obstacles keeps its tensors.

    Raises LoragenError if no such form exists.
    """
    if hopeless := [one.reason for one in obstacles(adapter)[server] if not one.mended]:
        raise LoragenError(
            f"{NAMES[server]}: {'; '.join(hopeless)}; serve a whole model: loragen lora export "
            "--merge"
        )
    config, tensors = adapter.config, adapter.tensors
    keys = list(factor_keys(tensors))
    scalings = {key_b: module_scaling(config, module_of(key_b)) for _, key_b in keys}
    rank = max(tensors[key_a].shape[0] for key_a, _ in keys)
    usual = Counter(scalings.values()).most_common(1)[0][0]
    alpha = round(usual * rank)
    if alpha < 1 or alpha / rank != usual:
        alpha = rank  # the scaling is 1, and all of it is in B
    plain = dict(tensors)
    for key_a, key_b in keys:
        a, b = tensors[key_a], _scaled(tensors[key_b], scalings[key_b] * rank / alpha)
        lacking = rank - len(a)
        plain[key_a], plain[key_b] = F.pad(a, (0, 0, 0, lacking)), F.pad(b, (0, lacking))
    kept = {key: value for key, value in config.items() if key in OLD_FIELDS}
    kept |= {key: config[key] for key in OTHER_FIELDS if config.get(key) is not None}
    kept |= {"r": rank, "lora_alpha": alpha}
    if not _are_names(kept["target_modules"]):
        kept["target_modules"] = sorted({module_of(a).rpartition(".")[2] for a, _ in keys})
    return replace(adapter, config=kept, tensors=plain)


def _scaled(b: Tensor, factor: float) -> Tensor:
    """Returns a B times a factor; in float32 if its own dtype would round the result."""
    if factor == 1:
        return b
    wide = b.double() * factor
    narrow = wide.to(b.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide.to(torch.float32)


def server_notes(adapter: Adapter) -> list[str]:
    """Returns one line for each thing that some server makes of an adapter, with the servers and
    what mends it."""
    by_reason: dict[Obstacle, list[Server]] = {}
    for server, several in obstacles(adapter).items():
        for one in several:
            by_reason.setdefault(one, []).append(server)
    lines = []
    for one, servers in by_reason.items():
        names = ", ".join(NAMES[server] for server in servers)
        mend = f"--for {servers[0]} mends it" if one.mended else "--merge writes a whole model"
        lines.append(f"{names}: {one.reason}; {mend}")
    return lines


def serve_command(server: Server, base_model: str, directory: str, rank: int) -> str:
    """Returns the command that serves the adapter in a directory (see docs/serving.md)."""
    if server == Server.vllm:
        most = next((size for size in VLLM_RANKS if size >= rank), rank)
        return (
            f"vllm serve {base_model} --enable-lora --max-lora-rank {most} "
            f"--lora-modules adapter={directory}"
        )
    if server == Server.sglang:
        return (
            f"python -m sglang.launch_server --model-path {base_model} --enable-lora "
            f"--lora-paths adapter={directory}"
        )
    if server == Server.lorax:
        return f"lorax-launcher --model-id {base_model}"
    return (
        f"python convert_lora_to_gguf.py --base BASE_DIRECTORY --outfile adapter.gguf {directory}"
    )
