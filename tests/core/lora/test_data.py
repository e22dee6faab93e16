import re
from types import SimpleNamespace

import pytest

from loragen.core.data.batches import batch_indices
from loragen.core.data.dataset import Dataset
from loragen.core.data.tokenize import Example, TokenizedRows, examples_hash
from loragen.core.errors import UsageError
from loragen.core.lora import data
from loragen.core.lora.data import LoraDataModule, MicroBatches, ValidationBatches, load_rows
from loragen.core.lora.packing import Cost
from loragen.core.lora.train import new_adapter


@pytest.fixture
def module(lora_config, dataset, tokenizer):
    """`module({...}, accumulation)`: the data module of a trainer that has done no step."""

    def new(settings=None, accumulation=1):
        config = lora_config({"training.packing": False, **(settings or {})})
        rows = load_rows(config, Dataset(dataset(), "colors"), tokenizer)
        made = LoraDataModule(rows, config, pad_id=0)
        made.trainer = SimpleNamespace(
            global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=accumulation
        )
        return made

    return new


@pytest.mark.parametrize("accumulation, processes", [(3, 1), (1, 3), (2, 4)])
def test_a_step_that_does_not_divide_among_the_devices_is_refused(module, accumulation, processes):
    """Their number is known only to the trainer: `devices: auto`."""
    with pytest.raises(UsageError, match=rf"training\.batch_size.*{processes} devices"):
        module().check_divisible(processes, accumulation)


@pytest.mark.parametrize("limit, steps", [(None, 8), (5, 2), (6, 3), (0.5, 4), (99, 8)])
def test_a_limit_ends_after_whole_steps(module, limit, steps):
    settings = {"trainer.limit_train_batches": limit} if limit else {}
    loader = module(settings, accumulation=2).train_dataloader()
    assert len(list(loader)) == steps * 2


@pytest.mark.parametrize("limit", [1, 0.01])
def test_a_limit_below_one_step_is_refused(module, limit):
    with pytest.raises(UsageError, match="limit_train_batches"):
        module({"trainer.limit_train_batches": limit}).check_divisible(1, 2)


class Counting:
    """A tokenizer that counts the rows it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.templates = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        self.templates += 1
        return self.tokenizer.apply_chat_template(*args, **kwargs)


def test_a_row_is_tokenised_by_the_step_that_draws_it(lora_config, dataset, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "CHECKED", 3)
    monkeypatch.setattr(data, "LONGEST", 2)
    questions = [{"prompt": f"q {i}" + "q" * (i in (7, 23)), "response": "red"} for i in range(50)]
    file = dataset(questions)
    config = lora_config({"training.max_steps": 25, "data.val_ratio": 0.1})
    counting = Counting(tokenizer)
    rows = load_rows(config, Dataset(file, "colors"), counting)
    assert counting.templates <= 2 * (3 + 2)  # the first and the longest of both splits
    assert (len(rows.training), len(rows.validation), rows.record.rows) == (45, 5, 50)
    assert rows.record.tokens.startswith("first:")
    before = counting.templates
    batches = MicroBatches(rows.training, 0, None, batch_size=4, seed=config.seed)
    drawn = batch_indices(45, 4, config.seed, step=20)
    assert batches[20].step_label_tokens == sum(rows.training[i].num_label_tokens for i in drawn)
    assert before < counting.templates <= before + 4


def test_the_hash_of_tokens_that_a_manifest_has_is_computed_again(
    lora_config, dataset, tokenizer, monkeypatch
):
    """Older manifests hash all rows, or all that the run draws."""
    monkeypatch.setattr(data, "CHECKED", 3)
    config = lora_config({"training.max_steps": 2, "data.val_ratio": 0.1})
    opened = Dataset(dataset([{"prompt": f"q {i}", "response": "red"} for i in range(50)]))
    rows = load_rows(config, opened, tokenizer)
    training, validation = rows.training, rows.validation
    indices = batch_indices(45, 8, config.seed, step=0)
    first, all_drawn = ([training[i] for i in sorted(some)] for some in (indices[:3], indices))
    assert rows.record.tokens == "first:" + examples_hash([*first, *validation[:3]])
    found = load_rows(config, opened, tokenizer, recorded="drawn:0").record.tokens
    assert found == "drawn:" + examples_hash([*all_drawn, *validation])
    found = load_rows(config, opened, tokenizer, recorded="0").record.tokens
    whole = TokenizedRows(opened.rows(), tokenizer, config.data.max_length)
    assert found == examples_hash(whole)


def test_a_batch_with_a_row_beyond_the_sliding_window_is_padded():
    examples = [Example([1, 2, 3, 4, 5], 1), Example([1, 2, 3, 4, 6, 7], 1)]
    cost = Cost(token=1.0, pair=1.0)
    packed = [
        MicroBatches(examples, 0, cost, batch_size=2, seed=0, window=window)[0].packed
        for window in (None, 6, 5)
    ]
    assert packed == [True, True, False]
    assert [
        batch.packed
        for batch in map(
            ValidationBatches(examples, 0, cost, batch_size=1, window=5).__getitem__, range(2)
        )
    ] == [True, False]


def test_of_many_rows_the_longest_show_that_some_are_cut(
    lora_config, base, dataset, caplog, monkeypatch
):
    monkeypatch.setattr(data, "CHECKED", 1)
    monkeypatch.setattr(data, "LONGEST", 2)
    file = dataset([{"prompt": "q" * (90 if n == 17 else 3), "response": "red"} for n in range(30)])
    load_rows(lora_config(), Dataset(file, "colors"), base.tokenizer)
    (record,) = caplog.records
    assert re.search(r"1 of \d rows looked at \(of 30\) are longer", record.getMessage())


def test_rows_that_lose_a_part_of_their_prompt_are_counted(lora_config, base, dataset, caplog):
    file = dataset([{"prompt": "q" * n, "response": "red"} for n in (3, 90, 3, 91)])
    load_rows(lora_config(), Dataset(file, "colors"), base.tokenizer)
    (record,) = caplog.records
    assert "2 of 4 rows are longer than data.max_length 64" in record.getMessage()


def test_one_misspelt_module_of_several_is_refused(lora_config, base):
    config = lora_config({"lora.target_modules": ["q_proj", "v_porj"]})
    before = list(base.model.state_dict())
    with pytest.raises(UsageError, match=r"lora\.target_modules: v_porj"):
        new_adapter(base, config)
    assert list(base.model.state_dict()) == before
