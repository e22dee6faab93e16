from types import SimpleNamespace

import pytest

from loragen.core.data.dataset import Dataset
from loragen.core.errors import UsageError
from loragen.core.lora.data import LoraDataModule, MicroBatches, load_rows
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


def test_only_the_rows_that_a_run_draws_are_tokenised(lora_config, dataset, tokenizer):
    file = dataset([{"prompt": f"q {i}", "response": "red"} for i in range(50)])
    config = lora_config({"training.max_steps": 2, "data.val_ratio": 0.1})
    counting = Counting(tokenizer)
    rows = load_rows(config, Dataset(file, "colors"), counting)
    assert counting.templates == 2 * 4 + 5  # two steps of four rows, and the validation rows
    assert (len(rows.training), len(rows.validation), rows.record.rows) == (45, 5, 50)
    assert rows.record.tokens.startswith("drawn:")
    batches = MicroBatches(rows.training, 0, None, batch_size=4, seed=config.seed)
    assert [batches[step].step_label_tokens for step in (0, 1)]
    assert counting.templates == 2 * 4 + 5
    assert batches[2]
    assert counting.templates > 2 * 4 + 5


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
