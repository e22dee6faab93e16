"""What every test needs: the machine's settings stay out, and nothing leaks to the next test."""

import importlib.util
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch is imported: more threads than cores are very slow, and nothing asks the hub.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import hypothesis
import pytest

from loragen.core import plugins
from loragen.core.data.dataset import Dataset

hypothesis.settings.register_profile("ours", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("ours")

ROOT = Path(__file__).parent.parent


def example_module(path):
    """A script below `examples/`, as a module."""
    file = ROOT / "examples" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMOLLM = example_module("real-tasks/fetch_model.py").default_directory()
"""Found before `clean_environment` hides LORAGEN_TEST_CACHE."""
COLORS, ANIMALS = ("red", "green", "blue"), ("cat", "dog", "cow")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY_LORA = {
    "data.max_length": 64,
    "lora.rank": 2,
    "lora.alpha": 4,
    "training.batch_size": 4,
    "training.max_steps": 8,
    "schedule.stage1_steps": 4,
    "schedule.learning_rate_stage1": 1e-2,
    "schedule.learning_rate_stage2": 1e-3,
    "checkpoints.first_step": 5,
    "loggers": {},
    "trainer.accelerator": "cpu",
}
TINY_GENERATOR = {
    "encoder.batch_size": 4,
    "decoder.blocks": 1,
    "decoder.hidden_dim": 16,
    "decoder.rank": 4,
    "layout.token_dim": 16,
    "data.batch_size": 4,
    "data.prompts_per_condition": 3,
    "data.samples_per_prompt": 2,
    "data.val_ratio": 0.25,
    "training.objective": "reconstruction",
    "training.max_epochs": 4,
    "training.learning_rate": 1e-2,
    "loggers": {},
    "trainer.accelerator": "cpu",
}
TRANSFER = {
    "training.objective": "transfer",
    "decoder": {"name": "mixture", "hidden_dim": 16},
    "behaviour.batch_size": 1,
}
"""Settings of a `gen train`, beside those above."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Settings of whoever runs the tests do not reach them."""
    for name in list(os.environ):
        if name.startswith(("LORAGEN_", "SWANLAB_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def restored_log():
    """The command line points the `loragen` logger at stderr, also in fixtures of a module;
    `caplog` needs it as it was."""
    logger = logging.getLogger("loragen")
    logger.handlers[:], logger.level, logger.propagate = [], logging.NOTSET, True


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("their-package", hooks)` puts a package with metadata on `sys.path`, as pip would.

    Its hook module is named after it; `modules` are further ones, name -> source.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    names: set[str] = set()

    def put(distribution: str, hooks: str, version: str = "1.0", **modules: str) -> Path:
        module = distribution.replace("-", "_")
        for name, source in {module: hooks, **modules}.items():
            (site / f"{name}.py").write_text(source, encoding="utf-8")
            names.add(name)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[loragen]\nit = {module}\n", encoding="utf-8")
        plugins.installed.cache_clear()
        return site

    yield put
    plugins.installed.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def only_theirs(monkeypatch):
    """The plugins of loragen itself, whose import takes seconds, are left out."""
    every = plugins.entry_points
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda **group: [one for one in every(**group) if one.dist.name != "loragen"],
    )


def rows_of(words, count=12, **more):
    """Labelled rows whose answers are `words` in turn."""
    return [
        {"prompt": f"Question {i} about {words[0]}?", "response": words[i % len(words)], **more}
        for i in range(count)
    ]


def write_lines(file, documents):
    """One JSON document a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


@pytest.fixture
def dataset(tmp_path):
    """`dataset(rows, name)` writes a JSONL file and tells where."""

    def write(rows=None, name="colors.jsonl"):
        return write_lines(tmp_path / name, rows_of(COLORS) if rows is None else rows)

    return write


@pytest.fixture(scope="session")
def shared():
    """The project's real data, beside the repository; skips where it is not."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("../shared is not here")
    return folder


@pytest.fixture(scope="session")
def smollm_dir():
    """SmolLM2-135M-Instruct, a real language model; skips where `make test` could not fetch it."""
    if not (SMOLLM / "config.json").is_file():
        pytest.skip("SmolLM2 is not here: python examples/real-tasks/fetch_model.py fetches it")
    return SMOLLM


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, with a chat template."""
    from loragen.core.base.load import quiet_libraries

    quiet_libraries()
    from transformers import Qwen2Tokenizer

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    texts = [*COLORS, *ANIMALS, "Question 0 about red?", "Question 1 about cat?"] * 4
    made = Qwen2Tokenizer(vocab=None, merges=None).train_new_from_iterator(
        texts, 290, new_special_tokens=special, show_progress=False
    )
    made.eos_token, made.pad_token = "<|end|>", "<|endoftext|>"
    made.chat_template = TEMPLATE
    made.model_max_length = 256
    return made


@pytest.fixture(scope="session")
def base_dir(tokenizer, tmp_path_factory):
    """A Qwen2 of two layers with random weights, as a directory. Nobody writes to it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,  # with the usual 0.02 no adapter could move the logits
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config)
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def base(base_dir):
    """The tiny base, loaded afresh."""
    from loragen.core.base.load import load_base

    return load_base(str(base_dir))


@pytest.fixture(scope="session")
def sbert_dir(tmp_path_factory):
    """A sentence-transformers model of 16 dimensions with random weights, as a directory."""
    from loragen.core.base.load import quiet_libraries

    quiet_libraries()
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += [*letters, *(f"##{letter}" for letter in letters)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        BertModel(config).save_pretrained(bert)
    words = {word: index for index, word in enumerate(vocabulary)}
    BertTokenizerFast(vocab=words, model_max_length=128).save_pretrained(bert)
    transformer = Transformer(str(bert))
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()],
        device="cpu",
    )
    directory = tmp_path_factory.mktemp("sbert")
    model.save(str(directory))
    return directory


def configured(model, settings):
    """A validated configuration from `{"training.batch_size": 4}`; the environment stays out."""
    from loragen.core.config import Override, load

    flags = [Override(tuple(key.split(".")), value, key) for key, value in settings.items()]
    return load(model, flags=flags, environment={})


def lora_manifest(**fields):
    """The manifest of a run of `lora train`, with these fields."""
    from loragen.core.run.directory import DatasetRecord, LoraManifest

    dataset = DatasetRecord(name="a", path="", sha256="", rows=1)
    usual = {"base_model": "demo", "dataset": dataset, "adapter_config": {}, "plugins": []}
    return LoraManifest(**{**usual, "seed": 1, "max_steps": 10, **fields})


@pytest.fixture
def lora_config(base_dir, tmp_path):
    """`lora_config({"training.max_steps": 3})`: a run of seconds into `tmp_path/runs`."""
    from loragen.core.config import LoraTrainConfig

    ours = {"base_model": str(base_dir), "runs_dir": str(tmp_path / "runs")}

    def make(settings=None):
        return configured(LoraTrainConfig, {**TINY_LORA, **ours, **(settings or {})})

    return make


@pytest.fixture
def train_lora(lora_config, base, dataset):
    """`train_lora({...})` trains on the colours and gives the run; `file` names other rows."""
    from loragen.core.lora.train import train_adapter
    from loragen.core.progress import Silent

    def run(settings=None, file=None, name="colors"):
        return train_adapter(
            lora_config(settings), Dataset(file or dataset(), name), base, Silent()
        )

    return run


@dataclass(frozen=True)
class Collection:
    """Two trained datasets. Nobody writes to it."""

    base: Path
    data: Path
    """`<name>/<name>_train_formatted.jsonl`"""
    runs: dict[str, Path]
    names = ("animals", "colors")

    def file(self, name):
        return self.data / name / f"{name}_train_formatted.jsonl"


@pytest.fixture(scope="session")
def collection(base_dir, tmp_path_factory):
    from loragen.core.base.load import load_base
    from loragen.core.config import LoraTrainConfig
    from loragen.core.lora.train import train_adapter
    from loragen.core.progress import Silent

    home = tmp_path_factory.mktemp("collection")
    ours = {"base_model": str(base_dir), "runs_dir": str(home / "runs")}
    config = configured(LoraTrainConfig, {**TINY_LORA, **ours})
    base = load_base(str(base_dir))
    made = Collection(base_dir, home / "data", {})
    for name, words in zip(made.names, (ANIMALS, COLORS), strict=True):
        file = write_lines(made.file(name), rows_of(words, count=16))
        made.runs[name] = train_adapter(config, Dataset(file, name), base, Silent()).directory
    return made


def generator_settings(collection, sbert_dir, home):
    """The tiny generator, which learns from the collection, into `home/experiments`."""
    return {
        **TINY_GENERATOR,
        "sources": [{"run": str(run)} for run in collection.runs.values()],
        "encoder.model": str(sbert_dir),
        "experiments_dir": str(home / "experiments"),
        "data.cache_dir": str(home / "cache"),
    }


@pytest.fixture
def gen_config(collection, sbert_dir, tmp_path):
    """`gen_config({...})`: learns from the collection, into `tmp_path/experiments`."""
    from loragen.core.config import GenTrainConfig

    ours = generator_settings(collection, sbert_dir, tmp_path)
    return lambda settings=None: configured(GenTrainConfig, {**ours, **(settings or {})})


@pytest.fixture(scope="session")
def experiment(collection, sbert_dir, tmp_path_factory):
    """A generator trained on the collection: its experiment directory. Nobody writes to it."""
    from loragen.core.config import GenTrainConfig
    from loragen.core.learning.train import train
    from loragen.core.progress import Silent

    ours = generator_settings(collection, sbert_dir, tmp_path_factory.mktemp("experiment"))
    return train(configured(GenTrainConfig, ours), Silent()).directory


@pytest.fixture
def legacy_run(collection, tmp_path):
    """`legacy_run("torch")`: a run directory of the original scripts below `tmp_path`."""
    from tests.legacy.runs import write_legacy_run

    return partial(write_legacy_run, collection, tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _hangups_arrive():
    """Also where the tests run under nohup, which has SIGHUP ignored: children inherit that."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the hub, with an empty cache, and a token that it accepts."""
    from huggingface_hub import constants

    from loragen.core import hub as ours
    from tests.hub import serve

    server = serve()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    ours.hub_problem.cache_clear()
    ours._downloaded.cache_clear()
    yield server.hub
    server.shutdown()
    server.server_close()
    ours.hub_problem.cache_clear()
    ours._downloaded.cache_clear()
