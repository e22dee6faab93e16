"""The recipe of examples/commonsense, on a few made-up rows."""

import importlib.util
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch

from loragen.core.base.load import load_base
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.data.tokenize import answer_ids, prompt_ids

EXAMPLE = Path(__file__).parent.parent / "examples" / "commonsense"
SYSTEM = "Answer by a single [ans]."


def write_datasets(root):
    """Two datasets, one of letters and one of truth."""
    for name, prompt, response in (
        ("letters", "Which number is {}?\nA: {}\nB: none", "[A]"),
        ("truth", "is {} the same as {}?", "[True]"),
    ):
        (root / name).mkdir(parents=True)
        for split, numbers in (("train", range(12)), ("test", range(12, 16))):
            rows = [
                {"prompt": prompt.format(n, n), "response": response, "system": SYSTEM}
                for n in numbers
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{name}_{split}_formatted.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_base", EXAMPLE / "pretrain_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pretrained(script, tmp_path_factory):
    """The directory of a base of three steps, and what was said."""
    root, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("base")
    write_datasets(root)
    said = StringIO()
    with redirect_stderr(said):
        script.main(["--data-root", str(root), "--output", str(out), "--steps", "3"])
    return out, said.getvalue()


def test_a_base_of_a_few_steps_loads_and_chats(pretrained):
    out, _ = pretrained
    base = load_base(str(out))
    ids = prompt_ids(base.tokenizer, "Which number is 3?", SYSTEM)
    assert (
        base.tokenizer.decode(ids) == f"<|system|>{SYSTEM}<|user|>Which number is 3?<|assistant|>"
    )
    assert answer_ids(base.tokenizer, "[A]")[-1] == base.tokenizer.eos_token_id
    logits = base.model(torch.tensor([ids])).logits
    assert logits.shape[-1] == len(base.tokenizer)
    assert torch.isfinite(logits).all()


def test_it_says_what_it_read_and_how_well_it_predicts(pretrained):
    _, said = pretrained
    assert "24 prompts, " in said
    assert "step     3  loss " in said
    assert "test prompts: " in said


def test_a_root_without_datasets_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="no dataset with a train split below it"):
        script.main(["--data-root", str(tmp_path), "--output", str(tmp_path / "base")])


def test_its_configurations_are_understood():
    assert load(LoraTrainConfig, EXAMPLE / "lora.yaml", environment={}).lora.rank == 4
    assert load(GenTrainConfig, EXAMPLE / "generator.yaml", environment={}).decoder.name
