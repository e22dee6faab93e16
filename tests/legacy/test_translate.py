import logging

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.config import GenTrainConfig, LoraTrainConfig
from loragen.core.config.keys import has_key
from loragen.core.config.load import guess_command
from loragen.core.config.schema import MODELS
from loragen.core.config.show import commented_defaults
from loragen.core.errors import ConfigError
from loragen.legacy.formats import FORMATS
from loragen.legacy.translate import (
    command_of_legacy_config,
    detect_format,
    migrate_config,
    translate,
)

from .conftest import load

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
logging: {swanlab: {project: mine}}
"""
# The blocks of the original generator's README, as they stand there.
GENERATOR = """\
model:
  text_encoder_name: "all-MiniLM-L6-v2"  # Sentence-BERT模型
  hidden_dim: 384                         # 隐藏层维度
  max_seq_len: 512                        # 最大序列长度
  num_hyperconv_blocks: 2                 # HyperConv块数量
  output_dim: 384                         # 输出维度
  freeze_text_encoder: true               # 冻结文本编码器
training:
  max_epochs: 100
  learning_rate: 1e-4
  weight_decay: 0.01
  mse_weight: 1.0
  l1_weight: 0.1
  optimizer_type: "AdamW"
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
    workspace: "组"
    experiment_name: "hyperconv-v1"
"""
ALL = [
    (TRADITIONAL, LoraTrainConfig, "traditional"),
    (FLAT, LoraTrainConfig, "flat Lightning"),
    (GENERATOR, GenTrainConfig, "original generator"),
]


@pytest.fixture
def warnings(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def values_at(config, keys):
    """The values at dotted keys; keys separated by spaces."""
    tree = config.model_dump(mode="json")
    found = []
    for key in keys.split():
        node = tree
        for part in key.split("."):
            node = node[part]
        found.append(node)
    return found


class TestTranslation:
    @pytest.mark.parametrize("text, model, name", ALL)
    def test_one_warning_names_the_format_and_how_to_migrate(
        self, configure, warnings, text, model, name
    ):
        configure(text, model=model)
        (warning,) = warnings()
        assert warning.startswith("c.yaml ")
        assert name in warning
        assert "`loragen config migrate c.yaml`" in warning

    def test_the_traditional_format(self, configure, warnings):
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
            "warmup_ratio": 0.0,
        }
        assert config.checkpoints.first_step == 61  # the scripts kept the steps of stage 2
        assert "8 rows x 4 accumulate_grad_batches" in warnings()[0]

    def test_the_flat_format(self, configure):
        config = configure(FLAT)
        assert (config.training.batch_size, config.checkpoints.first_step) == (16, 76)
        assert config.schedule.options["learning_rate_stage1"] == 2e-4
        assert list(config.loggers) == ["tensorboard", "swanlab"]  # the scripts had both
        assert config.loggers["swanlab"]["project"] == "mine"

    def test_the_generator_format(self, configure, warnings):
        config = configure(GENERATOR, model=GenTrainConfig)
        assert values_at(config, "encoder.name encoder.model encoder.frozen") == [
            "sbert", "all-MiniLM-L6-v2", True
        ]  # fmt: skip
        assert values_at(config, "decoder.hidden_dim decoder.blocks") == [384, 2]
        assert values_at(config, "layout.token_dim layout.max_seq_len") == [384, "auto"]
        assert values_at(config, "schedule.name training.optimizer") == ["cosine", "adamw"]
        training = config.training
        assert (training.max_epochs, training.learning_rate) == (100, 1e-4)
        assert (training.weight_decay, training.mse_weight, training.l1_weight) == (0.01, 1, 0.1)
        data = config.data
        assert data.checkpoint_dir == "runs/arc-challenge_lora_20250721_005053/checkpoints"
        assert (data.batch_size, data.samples_per_prompt) == (8, 4)
        assert (data.max_checkpoints, data.cache_tokenized) == (50, True)
        swanlab = config.loggers["swanlab"]
        assert (swanlab["project"], swanlab["workspace"]) == ("lora-research-2025", "组")
        assert swanlab["experiment_name"] == "hyperconv-v1"
        assert "layout.max_seq_len was model.max_seq_len: 512" in warnings()[0]

    @pytest.mark.parametrize(
        "old, key, current",
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
    def test_values_of_the_generator_format(self, old, key, current):
        """Whether the value is valid is left to the schema."""
        assert translate(yaml.safe_load(old), {}).get(key) == current

    @pytest.mark.parametrize(
        "old, key, current",
        [
            ("model: {name: a, torch_dtype: bfloat16}", "base_dtype", "bfloat16"),
            ("model: {name: a, torch_dtype: torch.float32}", "base_dtype", "float32"),
            ("model: {name: a, torch_dtype: null}", "base_dtype", "auto"),
            ("data: {num_workers: 4}", "data.workers", 4),
            ("dataloader_num_workers: 4", "data.workers", 4),
            ("bf16: true", "trainer.precision", "bf16-mixed"),
            ("fp16: false", "trainer.precision", "32-true"),
            ("precision: 16", "trainer.precision", "16-mixed"),
            # A batch size was that of one device and one accumulation step, and 32 by default.
            ("gradient_accumulation_steps: 3", "training.batch_size", 96),
            ("{batch_size: 8, devices: 2, num_nodes: 2}", "training.batch_size", 32),
            ("{batch_size: '8', devices: '2'}", "training.batch_size", 16),
            ("{batch_size: 8, devices: auto}", "training.batch_size", 8),
            ("stage2_steps: 4", "training.max_steps", 79),
            ("{max_steps: 100, stage2_steps: '25'}", "training.max_steps", 100),
        ],
    )
    def test_values_of_the_lora_formats(self, configure, old, key, current):
        tree = yaml.safe_load(old)
        if not tree.keys() & {"model", "data"}:
            tree = {"training": tree}
        tree.setdefault("training", {})["stage1_steps"] = 75
        assert values_at(configure(yaml.safe_dump(tree)), key) == [current]

    def test_a_logger_that_was_off_stays_off(self, configure):
        old = "training: {stage1_steps: 75}\nlogging: {swanlab: true, tensorboard: false}"
        assert list(configure(old).loggers) == ["swanlab"]

    def test_a_batch_of_an_unknown_number_of_devices_is_warned_of(self, configure, warnings):
        configure("training: {per_device_train_batch_size: 8}\ntrainer: {devices: auto}")
        assert "training.batch_size was training.per_device_train_batch_size" in warnings()[0]

    def test_a_removed_key_is_warned_of(self, configure, warnings):
        configure("model: {hidden_dim: 8}\ndata: {num_workers: 4}", model=GenTrainConfig)
        assert "data.num_workers: 4 was removed" in warnings()[0]

    @pytest.mark.parametrize(
        "text", ["logging: {swanlab: {project: team}}", "swanlab: {project: team}"]
    )
    @pytest.mark.parametrize("model", [LoraTrainConfig, GenTrainConfig])
    def test_a_file_of_swanlab_alone_serves_either_command(self, configure, warnings, model, text):
        config = configure(text, model=model)
        assert (" c.yaml --command lora`" in warnings()[0]) == (model is LoraTrainConfig)
        assert config.loggers["swanlab"]["project"] == "team"
        assert "tensorboard" in config.loggers

    def test_the_examples_of_the_original_documents(self, shared, configure, warnings):
        """Every YAML block that is a whole file loads; some blocks hold two files."""
        found = 0
        for seed in sorted((shared / "seeds").glob("00[23]*")):
            for block in seed.read_text(encoding="utf-8").split("```yaml\n")[1:]:
                text = block.split("```")[0].replace("# Lightning lightning_config.yaml", "---")
                for tree in map(yaml.safe_load, text.split("---")):
                    detected = detect_format(tree) if isinstance(tree, dict) else None
                    if detected is not None:
                        configure(yaml.safe_dump(tree), model=MODELS[detected.command])
                        found += 1
        assert found >= 5
        assert len(warnings()) == found

    def test_other_layers_come_on_top(self, configure):
        overrides = ["training.batch_size=64", "schedule.stage1_steps=5"]
        config = configure(TRADITIONAL, settings=overrides)
        assert config.training.batch_size == 64
        assert config.schedule.options["stage1_steps"] == 5
        assert config.schedule.options["learning_rate_stage1"] == 2e-4

    def test_one_current_key_leaves_an_old_file_old(self, configure):
        config = configure(f"{TRADITIONAL}  packing: false\n")
        assert (config.base_model, config.training.batch_size) == ("some/base", 32)
        assert not config.training.packing

    def test_the_tree_of_the_file_is_not_changed(self):
        tree = yaml.safe_load(TRADITIONAL)
        assert translate(tree, {}).tree != tree
        assert tree == yaml.safe_load(TRADITIONAL)


class TestErrors:
    """Each problem begins with its position and the key as it stands in the file."""

    @pytest.mark.parametrize(
        "text, position, words",
        [
            ("{stage1: {steps: many}}",
             "21 (training.stage1.steps): schedule.stage1_steps", "many"),
            ("{per_device_train_batch_size: 0}",
             "12 (training.per_device_train_batch_size): training.batch_size", "got 0"),
            ("{stage1_steps: 5, optimizer: sgd}", "29: training.optimizer", "sgd AdamW"),
            ("{stage1_steps: 5, warmup_steps: 10}", "29: training.warmup_steps", "10 warmup_ratio"),
            ("{stage1_steps: 5, learning_rate: 1e-3}",
             "29: training.learning_rate", "1e-3 schedule.learning_rate_stage1"),
            ("{stage1_steps: 5, stage2_steps: many}", "29: training.stage2_steps", "many"),
            ("{stage1: {steps: '60'}, stage2: {steps: 40}, max_steps: 125}",
             "44: training.stage2.steps", "40 training.max_steps 65"),
            ("{stage1: {steps: 75}, stage2: {steps: 25}, max_steps: 125}",
             "42: training.stage2.steps", "25 training.max_steps 50"),
            ("{stage1: {steps: 5, stepz: 6}}",
             "31: training.stage1.stepz", "unknown traditional 'steps'? learning_rate"),
            ("{stage1: 75}", "12: training.stage1", "mapping learning_rate steps 75"),
            ("{stage1_steps: 5, max_stps: 4}", "29: training.max_stps", "unknown 'max_steps'"),
            ("{stage1_steps: 5}\nschedule: {stage1_steps: 6}",
             "12: training.stage1_steps", "schedule.stage1_steps c.yaml:2:12"),
            ("{stage1_steps: 5}\nschedule: cosine",
             "12: training.stage1_steps", "schedule c.yaml:2:1"),
        ],
    )  # fmt: skip
    def test_in_a_lora_file(self, problems_of, text, position, words):
        found = problems_of(f"training: {text}")
        (problem,) = [one for one in found if one.startswith(f"c.yaml:1:{position}: ")]
        assert all(word in problem for word in words.split())

    @pytest.mark.parametrize(
        "text, position, words",
        [
            ("model: {freeze_text_encoder: perhaps}",
             "9 (model.freeze_text_encoder): encoder.frozen", "perhaps"),
            ("training: {optimizer_type: lion}",
             "12 (training.optimizer_type): training.optimizer", "lion"),
            ("training: {scheduler_type: lineer}",
             "12 (training.scheduler_type): schedule", "unknown lineer"),
            ("model: {hidden_dim: 8, hiden_dim: 9}",
             "24: model.hiden_dim", "unknown generator 'hidden_dim'?"),
            ("model: {max_seq_len: many}", "9 (model.max_seq_len): layout.max_seq_len", "many"),
            ("logging: {swanlab: {projct: x}}",
             "21 (logging.swanlab.projct): loggers.swanlab.projct", "unknown 'project'?"),
        ],
    )  # fmt: skip
    def test_in_a_generator_file(self, problems_of, text, position, words):
        (problem,) = problems_of(text, model=GenTrainConfig)
        assert problem.startswith(f"c.yaml:1:{position}: ")
        assert all(word in problem for word in words.split())

    @pytest.mark.parametrize("text, model, name", ALL)
    def test_the_file_of_another_command_is_one_problem(self, problems_of, text, model, name):
        other = GenTrainConfig if model is LoraTrainConfig else LoraTrainConfig
        (problem,) = problems_of(text, model=other)
        assert problem.startswith("c.yaml: ")
        assert name in problem

    def test_an_invalid_count_of_stage1_is_one_problem(self, problems_of):
        (problem,) = problems_of("training: {stage1: {steps: many}, stage2: {steps: 40}}")
        assert problem.startswith("c.yaml:1:21 (training.stage1.steps): schedule.stage1_steps: ")

    def test_all_problems_at_once(self, problems_of):
        found = problems_of(
            "training: {stage1: {steps: x}, optimizer: sgd, bogus: 1}\nlora: {r: 0}\n"
        )
        assert len(found) == 4


class TestDetection:
    @pytest.mark.parametrize(
        "text, legacy, command",
        [
            ("decoder: {blocks: 1}", None, "gen"),
            ("schedule: {name: two-stage}\nbase_model: a", None, "lora"),
            ("training: {mse_weight: 1, max_steps: 3}", None, "gen"),
            ("training: {patience: 1}\nbogus: 1", None, "lora"),
            ("seed: 3", None, "lora"),
            ("", None, "lora"),
            ("model: {hidden_dim: 3}", "gen", None),
            ("training: {stage1_steps: 3}", "lora", None),
            ("logging: {swanlab: {project: a}}", "gen", None),
            ("seed: 3\nlogging: {swanlab: {project: a}}", "gen", None),
            ("lora: {r: 4}\nlogging: {swanlab: {project: a}}", "lora", None),
        ],
    )
    def test_the_keys_decide_the_command(self, tmp_path, text, legacy, command):
        file = tmp_path / "c.yaml"
        file.write_text(text, encoding="utf-8")
        assert command_of_legacy_config(file) == legacy
        assert command is None or guess_command(file) == command

    @pytest.mark.parametrize("command, model", MODELS.items())
    def test_no_current_key_is_distinctive(self, command, model):
        for fmt in FORMATS:
            for key in fmt.distinctive_keys:
                assert fmt.command != command or not has_key(model, tuple(key.split(".")))

    @pytest.mark.parametrize("command", MODELS)
    def test_a_current_file_is_never_old_whatever_letter_is_missing(self, command):
        tree = yaml.safe_load(commented_defaults(command))
        assert detect_format(tree) is None
        for misspelt in _misspelt(tree):
            assert detect_format(misspelt) is None, misspelt

    @pytest.mark.parametrize(
        "text, position",
        [
            ("lora: {r: 4}", "8: lora.r"),
            ("model: {name: x}", "1: model"),
            ("training: {optimizer_type: adamw}", "12: training.optimizer_type"),
            ("training: {gradient_accumulation_steps: 4}",
             "12: training.gradient_accumulation_steps"),
        ],
    )  # fmt: skip
    def test_an_old_key_that_may_be_a_mistake_is_an_error_of_the_schema(
        self, problems_of, warnings, text, position
    ):
        (problem,) = problems_of(text)
        assert problem.startswith(f"c.yaml:1:{position}: unknown key")
        assert warnings() == []

    def test_in_a_mostly_current_file_only_distinctive_keys_are_translated(self, problems_of):
        text = "training: {stage1_steps: 60, optimizer: adamw}\nlora: {r: 4}\nbase_model: some/base"
        assert [line.partition(": unknown key")[0] for line in problems_of(text)] == [
            "c.yaml:2:8: lora.r",
            "c.yaml:1:30: training.optimizer",
        ]

    @pytest.mark.parametrize(
        "text, batch_size",
        [
            ("lora: {rank: 4}\ntraining: {packing: false, stage1_steps: 60}\ndata: {root: x}", 32),
            ("training: {batch_size: 8, stage1_steps: 60}\nbase_model: a", 8),
        ],
    )
    def test_the_batch_size_of_a_mostly_current_file_is_that_of_a_step(
        self, configure, text, batch_size
    ):
        config = configure(f"{text}\ntrainer: {{devices: 2}}")
        assert config.training.batch_size == batch_size
        assert config.schedule.options["stage1_steps"] == 60


def _misspelt(tree):
    for key, value in tree.items():
        rest = {k: v for k, v in tree.items() if k != key}
        for at in range(len(key)):
            yield {**rest, key[:at] + key[at + 1 :]: value}
        if isinstance(value, dict):
            for misspelt in _misspelt(value):
                yield {**tree, key: misspelt}


COUNTS, RATES = st.integers(1, 60), st.sampled_from([1e-4, "1e-4", "3E-5", 0.5])
LORA_VALUES = {
    "training.batch_size": COUNTS,
    "training.stage1_steps": COUNTS,
    "training.learning_rate_stage1": RATES,
    "training.learning_rate_stage2": RATES,
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
    "training.learning_rate": RATES,
    "data.checkpoint_dir": st.sampled_from(["a", ["a", "b"]]),
    "logging.swanlab": LORA_VALUES["logging.swanlab"],
}
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)
OLD_KEYS = sorted({key for f in FORMATS for key in (*f.renamed, *f.removed, *f.distinctive_keys)})


def _tree(values):
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`; a later key replaces a value on its way."""
    tree = {}
    for key, value in values.items():
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node[part] = node[part] if isinstance(node.get(part), dict) else {}
            node = node[part]
        node[last] = value
    return tree


def _files(values):
    return st.fixed_dictionaries({}, optional=values).map(_tree)


OLD_FILES = st.one_of(
    _files(LORA_VALUES),
    _files({NESTED.get(key, key): values for key, values in LORA_VALUES.items()}),
    _files(GENERATOR_VALUES),
).filter(detect_format)
in_one_directory = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(tree=OLD_FILES)
@in_one_directory
def test_a_migrated_file_loads_to_the_same_without_a_warning(tree, tmp_path, caplog):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    result = migrate_config(old)
    new.write_text(result.text, encoding="utf-8")
    model = MODELS[result.command]
    caplog.clear()
    config = load(model, old)
    assert len(caplog.records) == 1
    assert load(model, new) == config
    assert len(caplog.records) == 1
    again = migrate_config(new)
    assert (again.command, again.text) == (None, result.text)


@given(values=st.dictionaries(st.sampled_from(OLD_KEYS), ANY_VALUE, min_size=1, max_size=5))
@in_one_directory
def test_any_old_file_loads_or_names_the_positions_of_its_errors(values, tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(_tree(values)), encoding="utf-8")
    for model in MODELS.values():
        try:
            load(model, file)
        except ConfigError as error:
            assert all(problem.startswith(f"{file}:") for problem in error.problems)


class TestMigration:
    def migrate(self, tmp_path, text, command=None):
        file = tmp_path / "old.yaml"
        file.write_text(text, encoding="utf-8")
        return migrate_config(file, command)

    @pytest.mark.parametrize("text, model, name", ALL)
    def test_the_header_names_the_format_and_the_file(self, tmp_path, text, model, name):
        result = self.migrate(tmp_path, text)
        lines = result.text.splitlines()
        assert MODELS[result.command] is model
        assert lines[0].startswith("# ")
        assert name in lines[0]
        assert "(old.yaml)" in lines[0]
        assert not any(len(line) > 110 for line in lines)

    def test_every_change_is_a_comment(self, tmp_path):
        lines = self.migrate(tmp_path, TRADITIONAL).text.splitlines()
        assert "# lora.bias: none was removed; LoRA trains the matrices alone" in lines
        assert "  rank: 16  # was lora.r" in lines
        assert "  max_steps: 100" in lines  # unchanged
        assert "  learning_rate_stage1: 0.0002  # was training.stage1.learning_rate" in lines

    def test_the_command_may_be_given(self, tmp_path):
        text = "logging: {swanlab: {project: a}}\n"
        assert self.migrate(tmp_path, text).command == "gen"
        assert self.migrate(tmp_path, text, "lora").command == "lora"

    def test_a_current_file_is_not_changed(self, tmp_path):
        assert self.migrate(tmp_path, "# mine\nseed: 3\n").text == "# mine\nseed: 3\n"

    def test_an_invalid_file_is_not_migrated(self, tmp_path):
        with pytest.raises(ConfigError, match=r"old.yaml:1:9 \(model.max_seq_len\)"):
            self.migrate(tmp_path, "model: {max_seq_len: many}")
