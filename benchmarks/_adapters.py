"""Collections of made-up adapters in the shapes of real ones, for measurements of a generator.

A dataset has a subject and a task, which determine its adapter: the sum of a shared adapter and a
mixture of a few directions of weight space. Every checkpoint has noise of its own. The prompts name
the subject and the task in words.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

FACTORS = 4  # directions of the subject, and as many of the task
NOISE = 0.3  # of a checkpoint, in units of the distance between datasets

SUBJECTS = {
    "cooking": "bread soup onions butter rice pepper cheese mushrooms pasta garlic beans salad",
    "astronomy": "comets galaxies Saturn eclipses telescopes pulsars Mars nebulae orbits moons "
    "quasars meteors",
    "law": "contracts patents juries leases fines appeals custody statutes wills torts treaties "
    "bail",
    "football": "goalkeepers penalties strikers transfers offside referees corners leagues coaches "
    "fouls stadiums cups",
}
TASKS = {
    "choice": "Which statement about {} is true? (A) the first (B) the second (C) neither",
    "translation": "Translate into French: I have read a long article about {} today.",
    "summary": "Summarise this report on {} in one sentence for a busy reader.",
    "sum": "There are 12 books about {} and 7 are sold. How many are left?",
}
TRAINED_ON = (0, 1, 4, 6, 7, 9, 10, 11, 12, 14)  # of 16 pairs: each subject and task twice or more


@dataclass(frozen=True)
class Architecture:
    """A Qwen2 and the rank of a LoRA on all its linear layers."""

    hidden: int
    key_value: int
    wide: int
    layers: int
    rank: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Returns the shapes by the keys of PEFT's files."""
        hidden, narrow, wide = self.hidden, self.key_value, self.wide
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, narrow),
            "self_attn.v_proj": (hidden, narrow),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, wide),
            "mlp.up_proj": (hidden, wide),
            "mlp.down_proj": (wide, hidden),
        }
        shapes = {}
        for layer, (module, (into, out)) in product(range(self.layers), sizes.items()):
            stem = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (self.rank, into)
            shapes[f"{stem}.lora_B.weight"] = (out, self.rank)
        return shapes

    @property
    def values(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes().values())


SIZES = {
    "0.2M": Architecture(hidden=128, key_value=64, wide=576, layers=8, rank=8),
    "1M": Architecture(hidden=896, key_value=128, wide=4864, layers=24, rank=2),
    "4.4M": Architecture(hidden=896, key_value=128, wide=4864, layers=24, rank=8),
    "40M": Architecture(hidden=3584, key_value=512, wide=18944, layers=28, rank=16),
}
"""A small model; Qwen2.5-0.5B with ranks 2 and 8; Qwen2.5-7B with rank 16."""


class Dataset(NamedTuple):
    """A dataset with its made-up adapters."""

    name: str
    checkpoints: Path
    prompts: Path
    other_prompts: list[str]
    """Prompts in words that `prompts` do not have."""
    truth: Path
    """The adapter without noise."""
    trained_on: bool


def write_collection(
    folder: Path, architecture: Architecture, checkpoints: int, held_out: bool = False
) -> list[Dataset]:
    """Writes ten datasets with so many checkpoints together; with `held_out`, also six other pairs
    of the same subjects and tasks, with one checkpoint each."""
    shapes = architecture.shapes()
    generator = torch.Generator().manual_seed(0)
    shared = {key: _initial(key, shape, generator) for key, shape in shapes.items()}
    directions = [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(2 * FACTORS)
    ]
    of_subject, of_task = (torch.randn(4, FACTORS, generator=generator) for _ in range(2))
    found = []
    for number, (subject, task) in enumerate(product(SUBJECTS, TASKS)):
        trained_on = number in TRAINED_ON
        if not (trained_on or held_out):
            continue
        share = torch.cat([of_subject[number // 4], of_task[number % 4]])
        truth = {
            key: tensor
            + _spread(key, architecture)
            * sum((s * d[key] for s, d in zip(share.tolist(), directions, strict=True)), tensor * 0)
            for key, tensor in shared.items()
        }
        home = folder / f"{subject}-{task}"
        _write(home / "truth", truth, architecture)
        count = checkpoints // len(TRAINED_ON) if trained_on else 1
        for step, noisy in enumerate(_noisy(truth, count, architecture, generator)):
            _write(home / "checkpoints" / f"step-{step:04d}", noisy, architecture)
        words = SUBJECTS[subject].split()
        prompts = [
            TASKS[task].format(f"{a} and {b}") for a in words[:8] for b in words[:8] if a != b
        ]
        (home / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        others = [TASKS[task].format(f"{a} and {b}") for a in words[8:] for b in words[8:]]
        found.append(
            Dataset(
                home.name,
                home / "checkpoints",
                home / "prompts.txt",
                others,
                home / "truth",
                trained_on,
            )
        )
    return found


def _initial(key: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    if "lora_B" in key:
        return torch.zeros(shape)
    return (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5


def _spread(key: str, architecture: Architecture) -> float:
    """Returns the distance between datasets, in the units of the matrix."""
    return 0.01 if "lora_B" in key else 0.1 * architecture.hidden**-0.5


def _noisy(
    truth: dict[str, Tensor], count: int, architecture: Architecture, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    amount = NOISE * (2 * FACTORS) ** 0.5
    for _ in range(count):
        yield {
            key: tensor
            + amount * _spread(key, architecture) * torch.randn(tensor.shape, generator=generator)
            for key, tensor in truth.items()
        }


def _write(directory: Path, tensors: dict[str, Tensor], architecture: Architecture) -> None:
    directory.mkdir(parents=True)
    modules: Sequence[str] = sorted({key.split(".")[-3] for key in tensors})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "made-up",
        "r": architecture.rank,
        "lora_alpha": 2 * architecture.rank,
        "target_modules": modules,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors")
