import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.config import GenTrainConfig, LoraTrainConfig
from loragen.core.config.load import has_key
from loragen.core.config.schema import MODELS
from loragen.core.config.show import commented_defaults
from loragen.core.errors import ConfigError
from loragen.legacy.forms import FORMS
from loragen.legacy.translate import migrate, recognised, translated
from tests.legacy.conftest import load

TRADITIONAL = """\
model: {model_name_or_path: some/base}
lora: {r: 16, lora_alpha: 32, dropout: 0.1, target_modules: [q_proj, v_proj], bias: none}
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 4
  max_steps: 100
  stage1:
    steps: 60
    learning_rate: 2e-4
  stage2:
    steps: 40
    learning_rate: 2.0e-5
"""
FLAT = """\
training:
  batch_size: 16
  max_steps: 125
  stage1_steps: 75
  learning_rate_stage1: 2.0e-4
  learning_rate_stage2: 2.0e-5
logging: {swanlab: {project: ours}}
"""
GENERATOR = """\
model:
  text_encoder_name: "some/encoder"
  hidden_dim: 128
  max_seq_len: 512
  num_hyperconv_blocks: 2
  output_dim: 64
  freeze_text_encoder: true
training:
  max_epochs: 3
  learning_rate: 1e-3
  optimizer_type: "AdamW"
  scheduler_type: "cosine"
data:
  checkpoint_dir: "runs/a/checkpoints"
  batch_size: 4
logging:
  swanlab: {project: "team", workspace: "组", experiment_name: "v1"}
"""
README = """\
model:
  text_encoder_name: "all-MiniLM-L6-v2"  # Sentence-BERT模型
  hidden_dim: 384                         # 隐藏层维度
  max_seq_len: 512                        # 最大序列长度
  num_hyperconv_blocks: 3                 # HyperConv块数量
  output_dim: 384                         # 输出维度
  freeze_text_encoder: true               # 冻结文本编码器
training:
  max_epochs: 100
  learning_rate: 1e-4
  weight_decay: 0.01
  mse_weight: 1.0
  l1_weight: 0.1
  optimizer_type: "adamw"
  scheduler_type: "cosine"
data:
  checkpoint_dir: "runs/arc-challenge_lora_20250721_005053/checkpoints"
  batch_size: 8
  samples_per_prompt: 4
  max_checkpoints: 50
  cache_tokenized: true
logging:
  swanlab:
    project: "lora-research-2025"
    workspace: "ai-lab"
    experiment_name: "hyperconv-v1"
"""
"""The blocks of the original generator's README, as they stand there."""
OLD = [(TRADITIONAL, LoraTrainConfig), (FLAT, LoraTrainConfig), (GENERATOR, GenTrainConfig)]


@pytest.fixture
def notices(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


class TestWhatBecomesOfAnOldFile:
    def test_the_traditional_one(self, configure, notices):
        config = configure(TRADITIONAL)
        assert config.base_model == "some/base"
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.1)
        assert config.lora.target_modules == ["q_proj", "v_proj"]
        assert (config.training.batch_size, config.trainer.accumulate_grad_batches) == (32, 4)
        assert config.training.max_steps == 100
        assert config.schedule.name == "two-stage"
        assert config.schedule.options == {
            "stage1_steps": 60,
            "learning_rate_stage1": 2e-4,
            "learning_rate_stage2": 2e-5,
        }
        assert config.checkpoints.first_step == 61  # the scripts kept the steps of stage 2
        (notice,) = notices()
        assert notice.startswith(
            "c.yaml is in the traditional form; `loragen config migrate c.yaml` prints today's; "
        )
        assert "8 rows x 4 accumulate_grad_batches" in notice

    def test_the_flat_one(self, configure, notices):
        config = configure(FLAT)
        assert config.training.batch_size == 16
        assert config.schedule.options["learning_rate_stage1"] == 2e-4
        assert config.checkpoints.first_step == 76
        assert list(config.loggers) == ["tensorboard", "swanlab"]  # the scripts had both
        assert config.loggers["swanlab"]["project"] == "ours"
        (notice,) = notices()
        assert notice == (
            "c.yaml is in the flat Lightning form; `loragen config migrate c.yaml` prints today's"
        )

    def test_the_generators(self, configure, notices):
        config = configure(GENERATOR, model=GenTrainConfig)
        assert config.encoder.options["model"] == "some/encoder"
        assert config.decoder.options["hidden_dim"] == 128
        assert config.decoder.options["blocks"] == 2
        assert (config.layout.token_dim, config.layout.max_seq_len) == (64, "auto")
        assert (config.training.optimizer, config.schedule.name) == ("adamw", "cosine")
        assert config.training.learning_rate == 1e-3
        assert config.data.checkpoint_dir == "runs/a/checkpoints"
        assert config.loggers["swanlab"]["workspace"] == "组"
        (notice,) = notices()
        assert notice.startswith("c.yaml is in the original generator form; ")
        assert "512, which holds no real adapter" in notice

    def test_the_generators_readme(self, configure, notices):
        config = configure(README, model=GenTrainConfig)
        assert (config.encoder.name, config.encoder.options["frozen"]) == ("sbert", True)
        assert config.encoder.options["model"] == "all-MiniLM-L6-v2"
        assert config.decoder.options["hidden_dim"] == 384
        assert config.decoder.options["blocks"] == 3
        assert (config.layout.token_dim, config.layout.max_seq_len) == (384, "auto")
        training = config.training
        assert (training.max_epochs, training.learning_rate) == (100, 1e-4)
        assert (training.weight_decay, training.optimizer) == (0.01, "adamw")
        assert (training.mse_weight, training.l1_weight) == (1.0, 0.1)
        assert config.schedule.name == "cosine"
        data = config.data
        assert data.checkpoint_dir == "runs/arc-challenge_lora_20250721_005053/checkpoints"
        assert (data.batch_size, data.samples_per_prompt) == (8, 4)
        assert (data.max_checkpoints, data.cache_tokenized) == (50, True)
        swanlab = config.loggers["swanlab"]
        assert (swanlab["project"], swanlab["workspace"]) == ("lora-research-2025", "ai-lab")
        assert swanlab["experiment_name"] == "hyperconv-v1"
        (notice,) = notices()
        assert notice.count(";") == 3, "one value alone is another one today"

    @pytest.mark.parametrize(
        "old, keys, today",
        [
            ("training: {scheduler_type: linear}", "schedule.name", "linear"),
            ("training: {scheduler_type: Constant}", "schedule.name", "constant"),
            ("training: {scheduler_type: none}", "schedule.name", "constant"),
            ("training: {scheduler_type: null}", "schedule.name", "constant"),
            ("training: {scheduler_type: CosineAnnealingLR}", "schedule.name", "cosine"),
            ("training: {scheduler_type: two-stage}", "schedule.name", "two-stage"),
            ("training: {optimizer_type: Adam}", "training.optimizer", "adam"),
            ("training: {optimizer_type: SGD}", "training.optimizer", "sgd"),
            ("training: {optimizer_type: adamw_torch}", "training.optimizer", "adamw"),
            ("training: {optimizer_type: 3}", "training.optimizer", 3),
            ("model: {freeze_text_encoder: false}", "encoder.frozen", False),
            ("model: {output_dim: 128}", "layout.token_dim", 128),
            ("model: {max_seq_len: 12000}", "layout.max_seq_len", 12000),
        ],
    )
    def test_a_value_of_the_generators(self, old, keys, today):
        """Whether it is one of today's is for the schema to say."""
        tree = translated(yaml.safe_load(old), {}).tree
        for key in keys.split("."):
            tree = tree[key]
        assert tree == today

    @pytest.mark.parametrize(
        "text", ["logging: {swanlab: {project: team}}", "swanlab: {project: team}"]
    )
    @pytest.mark.parametrize("model", [LoraTrainConfig, GenTrainConfig])
    def test_the_section_of_swanlab_is_enough(self, configure, notices, model, text):
        config = configure(text, model=model)
        (notice,) = notices()
        assert (" c.yaml --command lora`" in notice) == (model is LoraTrainConfig)
        assert config.loggers["swanlab"]["project"] == "team"
        assert "tensorboard" in config.loggers

    def test_the_excerpts_of_the_seeds(self, shared, configure, notices):
        """Every YAML block of the original documents that is a whole file loads."""
        found = 0
        for seed in sorted((shared / "seeds").glob("00[23]*")):
            for block in seed.read_text(encoding="utf-8").split("```yaml\n")[1:]:
                for tree in _documents(block.split("```")[0]):
                    form = recognised(tree)
                    if form is not None:
                        configure(yaml.safe_dump(tree), model=MODELS[form.command])
                        found += 1
        assert found >= 5
        assert len(notices()) == found

    def test_other_layers_come_on_top(self, configure):
        settings = ["training.batch_size=64", "schedule.stage1_steps=5"]
        config = configure(TRADITIONAL, settings=settings)
        assert config.training.batch_size == 64
        assert config.schedule.options["stage1_steps"] == 5
        assert config.schedule.options["learning_rate_stage1"] == 2e-4

    def test_the_dtype_of_the_base_is_kept(self, configure, notices):
        old = "training: {stage1_steps: 75}\nmodel: {name: a, torch_dtype: "
        assert configure(old + "bfloat16}").base_dtype == "bfloat16"
        assert configure(old + "torch.float32}").base_dtype == "float32"
        assert configure(old + "null}").base_dtype == "auto"
        assert "dropped" not in "".join(notices())

    def test_the_workers_of_lora_are_kept(self, configure):
        old = "training: {stage1_steps: 75}\ndata: {num_workers: 4}"
        assert configure(old).data.workers == 4
        old = "training: {stage1_steps: 75, dataloader_num_workers: 4}"
        assert configure(old).data.workers == 4

    def test_a_generator_has_no_workers(self, configure, notices):
        configure("model: {hidden_dim: 8}\ndata: {num_workers: 4}", model=GenTrainConfig)
        assert "data.num_workers: 4 is dropped: pairs are read in the process" in notices()[0]

    def test_a_flag_is_a_precision(self, configure):
        old = "training: {stage1_steps: 75, "
        assert configure(old + "bf16: true}").trainer.precision == "bf16-mixed"
        assert configure(old + "fp16: false}").trainer.precision == "32-true"
        assert configure(old + "precision: 16}").trainer.precision == "16-mixed"

    def test_the_devices_share_a_batch(self, configure):
        old = "training: {per_device_train_batch_size: 8}\ntrainer: {devices: 2, num_nodes: 2}"
        assert configure(old).training.batch_size == 32

    def test_the_scripts_default_batch_was_a_devices_too(self, configure):
        old = "training: {stage1_steps: 75, gradient_accumulation_steps: 3}"
        assert configure(old).training.batch_size == 96

    def test_a_batch_of_who_knows_how_many_devices_is_told_of(self, configure, notices):
        old = "training: {per_device_train_batch_size: 8}\ntrainer: {devices: auto}"
        assert configure(old).training.batch_size == 8
        assert "8 rows, of each device; now they are of all together" in notices()[0]

    def test_a_logger_that_was_off_is_off(self, configure):
        old = "training: {stage1_steps: 75}\nlogging: {swanlab: true, tensorboard: false}"
        assert list(configure(old).loggers) == ["swanlab"]

    def test_the_steps_of_both_stages_make_the_total(self, configure):
        config = configure("training: {stage1: {steps: 3}, stage2: {steps: 4}}")
        assert config.training.max_steps == 7

    def test_a_count_in_quotes_is_a_count(self, configure):
        config = configure("training: {stage1: {steps: '60'}, stage2: {steps: '40'}}")
        assert (config.training.max_steps, config.checkpoints.first_step) == (100, 61)
        old = "training: {per_device_train_batch_size: '8', devices: '2'}"
        assert configure(old).training.batch_size == 16

    def test_one_key_of_today_leaves_an_old_file_old(self, configure):
        config = configure(f"{TRADITIONAL}  packing: false\n")
        assert (config.base_model, config.training.batch_size) == ("some/base", 32)
        assert not config.training.packing


def _documents(text):
    """A block of several excerpts (`# 传统 ...`, `# Lightning ...`), one tree each."""
    parts = text.replace("# Lightning lightning_config.yaml", "---").split("---")
    return [tree for tree in map(yaml.safe_load, parts) if isinstance(tree, dict)]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "text, problem",
        [
            (
                "training:\n  stage1:\n    steps: many",
                (
                    "c.yaml:3:5 (training.stage1.steps): schedule.stage1_steps: "
                    "input should be a valid integer"
                ),
            ),
            (
                "training:\n  per_device_train_batch_size: 0",
                (
                    "c.yaml:2:3 (training.per_device_train_batch_size): training.batch_size: "
                    "input should be greater than or equal to 1 (got 0)"
                ),
            ),
            (
                "training: {stage1_steps: 5, optimizer: sgd}",
                "c.yaml:1:29: training.optimizer: sgd has no place today: LoRA trains with AdamW",
            ),
            (
                "training: {stage1_steps: 5}\nmodel: {torch_dtype: float16}",
                "c.yaml:2:9 (model.torch_dtype): base_dtype: input should be 'auto', 'float32' or",
            ),
            (
                "training: {stage1_steps: 5, warmup_steps: 10}",
                "c.yaml:1:29: training.warmup_steps: 10 has no place today: schedule: {name: cos",
            ),
            (
                "training: {stage1_steps: 5, learning_rate: 1e-3}",
                "c.yaml:1:29: training.learning_rate: 1e-3 has no place today: each stage has",
            ),
            (
                "training: {stage1: {steps: '60'}, stage2: {steps: 40}, max_steps: 125}",
                "c.yaml:1:44: training.stage2.steps: 40 steps, but training.max_steps leaves 65",
            ),
            (
                "training: {stage1: {steps: 5, stepz: 6}}",
                (
                    "c.yaml:1:31: training.stage1.stepz: unknown key, today and in the traditional "
                    "form. Did you mean 'steps'? Known: learning_rate, steps"
                ),
            ),
            (
                "training: {stage1: 75}",
                "c.yaml:1:12: training.stage1: expected a mapping of learning_rate, steps (got 75)",
            ),
            (
                "training: {stage1: {steps: 75}, stage2: {steps: 25}, max_steps: 125}",
                "c.yaml:1:42: training.stage2.steps: 25 steps, but training.max_steps leaves 50",
            ),
            (
                "training: {stage1_steps: 5, max_stps: 4}",
                "c.yaml:1:29: training.max_stps: unknown key. Did you mean 'max_steps'?",
            ),
            (
                "training: {stage1_steps: 5}\nschedule: {stage1_steps: 6}",
                "c.yaml:1:12: training.stage1_steps: schedule.stage1_steps is given too, at c.ya",
            ),
            (
                "training: {stage1_steps: 5}\nschedule: cosine",
                "c.yaml:1:12: training.stage1_steps: schedule is given too, at c.yaml:2:1",
            ),
            (
                "training: {stage1_steps: 5}\nlogging: {swanlab: {projct: x}}",
                (
                    "c.yaml:2:21 (logging.swanlab.projct): loggers.swanlab.projct: unknown key. "
                    "Did you mean 'project'?"
                ),
            ),
        ],
    )
    def test_a_lora_file(self, problems_of, text, problem):
        found = problems_of(text)
        assert any(line.startswith(problem) for line in found), found

    @pytest.mark.parametrize(
        "text, problem",
        [
            (
                "model: {freeze_text_encoder: perhaps}",
                "c.yaml:1:9 (model.freeze_text_encoder): encoder.frozen: input should be",
            ),
            (
                "training: {optimizer_type: lion}",
                "c.yaml:1:12 (training.optimizer_type): training.optimizer: input should be 'ad",
            ),
            (
                "training: {scheduler_type: lineer}",
                "c.yaml:1:12 (training.scheduler_type): schedule: unknown schedule 'lineer'",
            ),
            (
                "model: {hidden_dim: 8, hiden_dim: 9}",
                (
                    "c.yaml:1:24: model.hiden_dim: unknown key, today and in the original "
                    "generator form. Did you mean 'hidden_dim'?"
                ),
            ),
            (
                "model: {max_seq_len: many}",
                "c.yaml:1:9 (model.max_seq_len): layout.max_seq_len: input should be",
            ),
        ],
    )
    def test_a_generator_file(self, problems_of, text, problem):
        found = problems_of(text, model=GenTrainConfig)
        assert any(line.startswith(problem) for line in found), found

    @pytest.mark.parametrize(
        "text, model, form",
        [
            (GENERATOR, LoraTrainConfig, "original generator form, which is for `loragen gen t"),
            (TRADITIONAL, GenTrainConfig, "traditional form, which is for `loragen lora train`"),
            (FLAT, GenTrainConfig, "flat Lightning form, which is for `loragen lora train`"),
        ],
    )
    def test_another_commands_file_is_one_problem(self, problems_of, text, model, form):
        (problem,) = problems_of(text, model=model)
        assert problem.startswith(f"c.yaml: in the {form}")

    def test_a_stage_of_who_knows_how_many_steps_is_one_problem(self, problems_of):
        (problem,) = problems_of("training: {stage1: {steps: many}, stage2: {steps: 40}}")
        assert problem.startswith("c.yaml:1:21 (training.stage1.steps): schedule.stage1_steps: ")

    def test_every_problem_at_once(self, problems_of):
        found = problems_of(
            "training: {stage1: {steps: x}, optimizer: sgd, bogus: 1}\nlora: {r: 0}\n"
        )
        assert len(found) == 4


class TestTodaysFiles:
    """They are never taken for old ones."""

    @pytest.mark.parametrize("command", MODELS)
    def test_with_any_letter_missing(self, command):
        tree = yaml.safe_load(commented_defaults(command))
        assert recognised(tree) is None
        for mistaken in _misspelt(tree):
            assert recognised(mistaken) is None, mistaken

    @pytest.mark.parametrize("command, model", MODELS.items())
    def test_no_key_of_today_is_a_sign(self, command, model):
        for form in FORMS:
            for sign in form.signs:
                assert form.command != command or not has_key(model, tuple(sign.split(".")))

    @pytest.mark.parametrize(
        "text, problem",
        [
            ("lora: {r: 4}", "c.yaml:1:8: lora.r: unknown key. Known: rank"),
            ("model: {name: x}", "c.yaml:1:1: model: unknown key."),
            (
                "training: {optimizer_type: adamw}",
                "c.yaml:1:12: training.optimizer_type: unknown key. Known: batch_size",
            ),
            (
                "training: {gradient_accumulation_steps: 4}",
                "c.yaml:1:12: training.gradient_accumulation_steps: unknown key.",
            ),
        ],
    )
    def test_a_plausible_mistake_keeps_todays_error(self, problems_of, notices, text, problem):
        (found,) = problems_of(text)
        assert found.startswith(problem)
        assert notices() == []

    def test_of_a_mixed_file_only_what_is_certainly_old_is_translated(self, problems_of):
        text = "training: {stage1_steps: 60, optimizer: adamw}\nlora: {r: 4}\nbase_model: some/base"
        assert [line.partition(". ")[0] for line in problems_of(text)] == [
            "c.yaml:2:8: lora.r: unknown key",
            "c.yaml:1:30: training.optimizer: unknown key",
        ]

    def test_keys_of_shared_sections_may_be_todays_alone(self, configure, notices):
        config = configure(
            "lora: {rank: 4}\ntraining: {packing: false, stage1_steps: 60}\n"
            "data: {root: x}\ntrainer: {devices: 2}"
        )
        assert config.training.batch_size == 32
        assert config.schedule.options["stage1_steps"] == 60
        assert "rows" not in notices()[0]

    def test_a_mixed_files_batch_is_todays(self, configure):
        text = "training: {batch_size: 8, stage1_steps: 60}\nbase_model: a\ntrainer: {devices: 2}"
        config = configure(text)
        assert config.training.batch_size == 8
        assert config.schedule.options["stage1_steps"] == 60


def _misspelt(tree):
    for key, value in tree.items():
        rest = {k: v for k, v in tree.items() if k != key}
        for at in range(len(key)):
            yield {**rest, key[:at] + key[at + 1 :]: value}
        if isinstance(value, dict):
            for mistaken in _misspelt(value):
                yield {**tree, key: mistaken}


NUMBERS = {
    "batch_size": st.integers(1, 64),
    "steps": st.integers(1, 60),
    "rates": st.sampled_from([1e-4, "1e-4", "3E-5", 0.5]),
}
LORA_VALUES = {
    "training.batch_size": NUMBERS["batch_size"],
    "training.stage1_steps": NUMBERS["steps"],
    "training.learning_rate_stage1": NUMBERS["rates"],
    "training.learning_rate_stage2": NUMBERS["rates"],
    "training.max_steps": st.integers(61, 200),
    "training.gradient_accumulation_steps": st.integers(1, 4),
    "training.precision": st.sampled_from([16, "bf16", "32", "16-mixed"]),
    "training.warmup_steps": st.sampled_from([0, None]),
    "training.optimizer": st.just("adamw"),
    "training.output_dir": st.text("abc/ ü项", min_size=1),
    "model": st.sampled_from(["some/base", "no", "5", "模型"]),
    "lora.r": st.integers(1, 8),
    "lora.lora_alpha": st.floats(0.5, 64),
    "data.num_workers": st.integers(0, 8),
    "trainer.devices": st.integers(1, 4),
    "logging.swanlab": st.sampled_from([None, True, {"project": "a: b # c"}, {"tags": ["x"]}]),
    "logging.tensorboard": st.booleans(),
}
NESTED = {
    "training.batch_size": "training.per_device_train_batch_size",
    "training.stage1_steps": "training.stage1.steps",
    "training.learning_rate_stage1": "training.stage1.learning_rate",
    "training.learning_rate_stage2": "training.stage2.learning_rate",
}
GENERATOR_VALUES = {
    "model.text_encoder_name": st.text("ab/c ", min_size=1),
    "model.hidden_dim": st.integers(1, 64),
    "model.max_seq_len": st.sampled_from([512, 12000, "auto"]),
    "model.num_hyperconv_blocks": st.integers(0, 4),
    "model.output_dim": st.integers(1, 64),
    "model.freeze_text_encoder": st.just(True),
    "training.optimizer_type": st.sampled_from(["adamw", "AdamW"]),
    "training.scheduler_type": st.sampled_from(["cosine", "constant", "Cosine", None]),
    "training.learning_rate": NUMBERS["rates"],
    "data.checkpoint_dir": st.sampled_from(["a", ["a", "b"]]),
    "logging.swanlab": LORA_VALUES["logging.swanlab"],
}


def _tree(values):
    tree = {}
    for path, value in values.items():
        node = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


OLD_TREES = st.one_of(
    st.fixed_dictionaries({}, optional=LORA_VALUES).map(_tree),
    st.fixed_dictionaries(
        {}, optional={NESTED.get(path, path): of for path, of in LORA_VALUES.items()}
    ).map(_tree),
    st.fixed_dictionaries({}, optional=GENERATOR_VALUES).map(_tree),
).filter(recognised)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
EVERY_PATH = sorted({path for form in FORMS for path in (*form.moved, *form.dropped, *form.signs)})
in_one_directory = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(tree=OLD_TREES)
@in_one_directory
def test_a_migrated_file_loads_without_notice_to_the_same(tree, tmp_path, caplog):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    result = migrate(old)
    new.write_text(result.text, encoding="utf-8")
    model = MODELS[result.command]
    caplog.clear()
    config = load(model, old, environment={})
    assert len(caplog.records) == 1
    assert load(model, new, environment={}) == config
    assert len(caplog.records) == 1
    again = migrate(new)
    assert (again.command, again.text) == (None, result.text)


@given(paths=st.lists(st.sampled_from(EVERY_PATH), min_size=1, max_size=5), data=st.data())
@in_one_directory
def test_whatever_an_old_file_says_it_loads_or_says_where_it_is_wrong(paths, data, tmp_path):
    tree = {}
    for path in paths:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node[key] = node[key] if isinstance(node.get(key), dict) else {}
            node = node[key]
        node[last] = data.draw(ANY_VALUE)
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    for model in MODELS.values():
        try:
            load(model, file, environment={})
        except ConfigError as error:
            assert all(problem.startswith(f"{file}:") for problem in error.problems)


def test_an_old_files_tree_is_left_as_it_was():
    tree = yaml.safe_load(TRADITIONAL)
    assert translated(tree, {}).tree != tree
    assert tree == yaml.safe_load(TRADITIONAL)


class TestMigrate:
    @pytest.mark.parametrize("text, model", OLD)
    def test_it_says_what_has_changed(self, tmp_path, text, model):
        file = tmp_path / "old.yaml"
        file.write_text(text, encoding="utf-8")
        lines = migrate(file).text.splitlines()
        assert lines[0].endswith("form (old.yaml).")
        assert not any(len(line) > 110 for line in lines)

    def test_the_comments(self, tmp_path):
        file = tmp_path / "old.yaml"
        file.write_text(TRADITIONAL, encoding="utf-8")
        text = migrate(file).text
        assert "# lora.bias: none is dropped: LoRA trains the matrices alone\n" in text
        assert "  rank: 16  # was lora.r\n" in text
        assert "  max_steps: 100\n" in text  # as it was
        assert "learning_rate_stage1: 0.0002  # was training.stage1.learning_rate\n" in text

    @pytest.mark.parametrize(
        "more, command", [("", "gen"), ("lora: {r: 4}\n", "lora"), ("seed: 3\n", "gen")]
    )
    def test_the_other_keys_tell_whose_a_section_of_swanlab_is(self, tmp_path, more, command):
        file = tmp_path / "old.yaml"
        file.write_text(f"{more}logging: {{swanlab: {{project: a}}}}\n", encoding="utf-8")
        assert migrate(file).command == command
        assert migrate(file, "lora").command == "lora"

    def test_a_file_of_today_stays_as_it_is(self, tmp_path):
        file = tmp_path / "new.yaml"
        file.write_text("# mine\nseed: 3\n", encoding="utf-8")
        assert migrate(file).text == "# mine\nseed: 3\n"

    def test_what_cannot_be_said_today_is_not_migrated(self, tmp_path):
        file = Path(tmp_path / "old.yaml")
        file.write_text("model: {max_seq_len: many}", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"old.yaml:1:9 \(model.max_seq_len\)"):
            migrate(file)
