"""loragen on a real language model: random weights hide what rounding and training do to one."""

import pytest
import torch

from loragen.core.adapter.files import attach_adapter
from loragen.core.base.load import load_base, load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.data.chat import answer_ids, pad_id, prompt_ids
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.tokenize import tokenize_row
from loragen.core.lora.evaluate import evaluate_model
from loragen.core.lora.packing import answer_losses, collate, packing_cost
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import read_checkpointed_adapter
from tests.conftest import configured, write_lines

ANIMALS = ("horse", "tiger", "eagle", "salmon", "rabbit", "spider")
ANIMALS += ("whale", "donkey", "pigeon", "lizard", "goat", "wolf")
THINGS = ("hammer", "pencil", "bottle", "window", "carpet", "ladder")
THINGS += ("mirror", "basket", "candle", "trumpet", "sofa", "key")
TRAINED = 8
"""Nothing is trained on the later words of each kind."""


def rows_of_kinds(first, last):
    kinds = (("animal", ANIMALS[first:last]), ("thing", THINGS[first:last]))
    return [
        {"prompt": f"Is it an animal or a thing?\n{word}", "response": kind}
        for kind, words in kinds
        for word in words
    ]


def tokenized(base, rows):
    lines = [Row(**row, line=line) for line, row in enumerate(rows, start=1)]
    return [tokenize_row(base.tokenizer, row, 1024).example for row in lines]


@pytest.fixture(scope="module")
def base(smollm_dir):
    return load_base(str(smollm_dir))


@pytest.fixture
def train(smollm_dir, tmp_path):
    """`train(base, {...})` trains on the kinds of words, from the settings of a short run."""
    settings = {
        "base_model": str(smollm_dir),
        "base_dtype": "float32",
        "runs_dir": str(tmp_path / "runs"),
        "lora.rank": 8,
        "lora.alpha": 16,
        "training.batch_size": 8,
        "schedule.name": "constant",
        "schedule.learning_rate": 1e-3,
        "final_model": "none",
        "loggers": {},
        "trainer.accelerator": "cpu",
    }
    rows = rows_of_kinds(0, TRAINED)
    file = write_lines(tmp_path / "kinds.jsonl", rows)

    def run(more, base=None):
        config = configured(
            LoraTrainConfig,
            {**settings, "checkpoints.first_step": more["training.max_steps"], **more},
        )
        return train_adapter(
            config, Dataset(file, "kinds"), base or load_training_base(config), Silent()
        )

    return run


def test_a_prompt_goes_through_the_chat_template(base):
    ids = prompt_ids(base.tokenizer, "Is it a plant?", None, ())
    assert base.tokenizer.decode(ids) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nIs it a plant?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert base.tokenizer.decode(answer_ids(base.tokenizer, "Yes.")) == "Yes.<|im_end|>"


def test_packed_rows_have_the_losses_of_padded_ones(base):
    examples = tokenized(base, rows_of_kinds(0, 6))
    padding = pad_id(base.tokenizer)
    cost = packing_cost(base.model, examples, padding, rows=8)
    assert cost is not None
    with torch.no_grad():
        packed = collate(examples, padding, cost)
        assert len(packed.ids) < len(examples)
        losses = answer_losses(base.model, packed)
        alone = [answer_losses(base.model, collate([one], padding)).sum() for one in examples]
    torch.testing.assert_close(losses.sum(), sum(alone), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.2)])
def test_one_step_in_each_dtype(base, train, dtype, tolerance):
    """A new adapter changes nothing: the first loss is that of the base on all 16 rows."""
    run = train({"training.max_steps": 1, "training.batch_size": 16, "base_dtype": dtype})
    batch = collate(tokenized(base, rows_of_kinds(0, TRAINED)), pad_id(base.tokenizer))
    with torch.no_grad():
        expected = answer_losses(base.model, batch).mean().item()
    assert run.manifest.base_dtype == dtype
    assert run.manifest.final_loss == pytest.approx(expected, abs=tolerance)
    tensors = read_checkpointed_adapter(run.directory).tensors
    for moved in (tensor for key, tensor in tensors.items() if ".lora_B." in key):
        assert moved.isfinite().all()
        assert moved.abs().max() > 0


def test_a_task_is_learned_in_20_steps(base, train):
    rows = rows_of_kinds(TRAINED, len(ANIMALS))
    tested = [Row(**row, line=line) for line, row in enumerate(rows, start=1)]
    before = evaluate_model(base.model, base.tokenizer, tested, choices=False)
    run = train({"training.max_steps": 20}, base)
    model = attach_adapter(base.model, read_checkpointed_adapter(run.directory), "the adapter")
    try:
        after = evaluate_model(model, base.tokenizer, tested, choices=False)
    finally:
        model.unload()
    assert before.exact_match == 0
    assert after.exact_match >= 0.75


def test_a_greedy_answer(base):
    prompt = "What is the capital of France?"
    row = Row(prompt=prompt, response="The capital of France is Paris.", line=1)
    scores = evaluate_model(base.model, base.tokenizer, [row], choices=False)
    assert scores.exact_match == 1
