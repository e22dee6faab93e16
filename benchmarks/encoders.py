"""Does an encoder recognise a task in other words? Compares encoders on a folder of tasks.

    python benchmarks/encoders.py TASKS --encoder sbert --encoder hashing \
        --encoder "transformers model=DIRECTORY layer=15"

A task is a folder with a file of rows `*train*.jsonl`, and one `*unseen*.jsonl` in wordings that no
training row has. A task is read as the decoder `neighbours` reads it: prompts joined to texts, the
mean of their embeddings, the cosine of these means less the mean of all tasks. Nothing is trained,
and no base model is needed.

Prints one JSON line per encoder. `own` is the share of tasks whose unseen wordings lie nearest to
their own training rows, `rank` the mean rank of these among all tasks (1 is best), `family` the
share whose nearest *other* task is of their family, where `tasks.json` names families, `by_chance`
the same for a task drawn at random. All are means over the draws of prompts.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from loragen.core.data.dataset import Dataset
from loragen.core.data.prompts import joined_texts
from loragen.core.plugins import create
from loragen.core.protocols import Encoder
from loragen.plugins.decoders.reading import centred, mean_over_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path, help="A folder of tasks.")
    parser.add_argument("--encoder", action="append", required=True, help="NAME [KEY=VALUE ...]")
    parser.add_argument("--known", type=int, default=64, help="Training prompts of a task.")
    parser.add_argument("--prompts", type=int, default=16, help="Unseen prompts of a draw.")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples-per-prompt", type=int, default=4, help="Prompts of a text.")
    arguments = parser.parse_args()
    folders = sorted(file.parent for file in arguments.tasks.glob("*/*unseen*.jsonl"))
    if len(folders) < 3:
        parser.error(f"{arguments.tasks}: {len(folders)} tasks with a file *unseen*.jsonl")
    texts = [
        [
            joined_texts(drawn(folder, kind, draw, count), arguments.samples_per_prompt)
            for folder in folders
        ]
        for kind, draw, count in [
            ("train", 0, arguments.known),
            *(("unseen", draw, arguments.prompts) for draw in range(arguments.draws)),
        ]
    ]
    for described in arguments.encoder:
        name, *options = described.split()
        encoder = create("encoder", name, dict(option.split("=", 1) for option in options))
        started = time.perf_counter()
        known, *queries = (readings(encoder, of_tasks) for of_tasks in texts)
        seconds = time.perf_counter() - started
        found = scores(known, queries, families(arguments.tasks, folders))
        count = sum(len(one) for of_tasks in texts for one in of_tasks)
        rate = {
            "tasks": len(folders),
            "texts": count,
            "texts_per_second": round(count / seconds, 1),
        }
        print(json.dumps({"encoder": described, **found, **rate}), flush=True)


def drawn(folder: Path, kind: str, draw: int, count: int) -> list[str]:
    """Returns prompts of a task, drawn at random: the same ones for every encoder."""
    (file,) = folder.glob(f"*{kind}*.jsonl")
    prompts = Dataset(file).prompts()
    return Random(f"{folder.name}:{kind}:{draw}").sample(prompts, min(count, len(prompts)))


def families(tasks: Path, folders: Sequence[Path]) -> list[str] | None:
    file = tasks / "tasks.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    return [known[folder.name]["family"] for folder in folders]


@torch.no_grad()
def readings(encoder: Encoder, tasks: Sequence[Sequence[str]]) -> Tensor:
    """Returns the mean embedding ``[tasks, dim]`` of each task's texts."""
    embeddings, mask = encoder([text for texts in tasks for text in texts])
    sizes = [len(texts) for texts in tasks]
    parts = zip(embeddings.split(sizes), mask.split(sizes), strict=True)
    return torch.cat([mean_over_prompts(one[None], kept[None]) for one, kept in parts])


def scores(
    known: Tensor, queries: Sequence[Tensor], family: Sequence[str] | None
) -> dict[str, float]:
    """Compares ``known [tasks, dim]`` with each draw of ``queries``, ``[tasks, dim]``."""
    count = len(known)
    own, diagonal = torch.arange(count), torch.eye(count, dtype=torch.bool)
    none = torch.zeros_like(diagonal)
    found: dict[str, list[Tensor]] = {"own": [], "rank": [], "family": []}
    for query in queries:
        similarity = similarities(query, known, none)
        rank = 1 + (similarity > similarity[own, own, None]).sum(1)
        found["own"].append((rank == 1).float().mean())
        found["rank"].append(rank.float().mean())
        if family:  # a task that is held out, as its own adapter is in a leave-one-out
            nearest = similarities(query, known, diagonal).masked_fill(diagonal, -2).argmax(1)
            same = torch.tensor([[a == b for b in family] for a in family])
            related = same.sum(1) > 1
            found["family"].append(same[own, nearest][related].float().mean())
    result = {key: round(float(torch.stack(one).mean()), 3) for key, one in found.items() if one}
    if family:
        chance = ((same.sum(1) - 1) / (count - 1))[related].mean()
        result["by_chance"] = round(float(chance), 3)
    return result


def similarities(query: Tensor, known: Tensor, left_out: Tensor) -> Tensor:
    """Returns the cosines ``[tasks, tasks]`` of the centred readings."""
    query, known, _ = centred(query, known, left_out)
    return torch.nn.functional.cosine_similarity(query[:, None], known, dim=-1)


if __name__ == "__main__":
    main()
