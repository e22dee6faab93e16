import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.adapter.export import describe_base, front_matter, how_to_load
from loragen.core.base import gguf
from loragen.core.base.load import empty_base, is_local, load_base, load_tokenizer
from loragen.core.base.names import absolute_base, is_path, resolve_base
from loragen.core.errors import LoragenError, UsageError
from loragen.core.lora.tasks import same_base
from tests.core.base.gguf_files import write_gguf

pytest.importorskip("gguf", reason="the extra gguf is not installed")
EMBEDDING = "token_embd.weight"


@pytest.fixture(scope="session")
def written(base_dir, tmp_path_factory):
    """Two GGUF files of the tiny base: in float32, and with the embedding in 8 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    owner = {"repo_url": "https://huggingface.co/makers/tiny", "base_model.0.name": "Tinier"}
    return (
        write_gguf(base_dir, folder / "tiny.F32.gguf", **owner),
        write_gguf(base_dir, folder / "tiny.Q8_0.gguf", quantized={EMBEDDING}),
    )


@pytest.fixture(scope="session")
def cache_of_session(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(cache_of_session, monkeypatch):
    """The user's own cache stays as it is."""
    monkeypatch.setattr(gguf, "user_cache_path", lambda name: cache_of_session / name)
    return cache_of_session


@pytest.fixture
def file(written):
    return written[0]


class TestModel:
    def test_it_is_the_one_that_the_file_was_made_from(self, base, file):
        loaded = load_base(str(file))
        assert loaded.name == str(file)
        assert loaded.dtype == torch.float32
        assert loaded.fingerprint == base.fingerprint
        ours, theirs = base.model.state_dict(), loaded.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        ids = torch.tensor([base.tokenizer("red cat").input_ids])
        assert torch.equal(base.model(ids).logits, loaded.model(ids).logits)

    def test_so_is_its_tokenizer_with_its_chat_template(self, base, file):
        tokenizer = load_tokenizer(str(file))
        for text in ("Question 12 about red?", " a  b\n\tc 2026", "naïve 猫<|end|>"):
            assert tokenizer(text).input_ids == base.tokenizer(text).input_ids
        assert tokenizer.chat_template == base.tokenizer.chat_template
        assert tokenizer.eos_token_id == base.tokenizer.eos_token_id

    def test_quantised_weights_are_dequantised(self, base, written):
        import gguf as library

        kind = library.GGMLQuantizationType.Q8_0
        original = base.model.get_input_embeddings().weight.numpy()
        expected = library.quants.dequantize(library.quants.quantize(original, kind), kind)
        loaded = load_base(str(written[1])).model.get_input_embeddings().weight.numpy()
        assert (loaded == expected).all()
        assert (loaded != original).any()

    def test_in_another_dtype(self, file):
        base = load_base(str(file), torch.bfloat16)
        assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
        assert base.dtype == torch.float32

    def test_the_architecture_alone_has_no_weights(self, base, file):
        with torch.device("meta"):
            model = empty_base(str(file), local_files_only=True).model
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.state_dict().keys() == base.model.state_dict().keys()

    def test_dequantising_on_the_meta_device_gives_real_weights(self, file, cache, monkeypatch):
        monkeypatch.setattr(gguf, "user_cache_path", lambda _: cache / "another")
        with torch.device("meta"):
            empty_base(str(file))
        assert load_base(str(file)).model.get_input_embeddings().weight.abs().sum() > 0


class TestCache:
    def test_a_file_is_dequantised_once(self, file, monkeypatch):
        directory = gguf.dequantized(file)
        assert json.loads((directory / gguf.RECORD).read_text("utf-8"))["file"] == file.name
        monkeypatch.setattr(gguf, "write_dequantized", lambda *_: pytest.fail("dequantised again"))
        monkeypatch.setattr(gguf, "find_spec", lambda _: None)  # the extra is not needed any more
        assert gguf.dequantized(file) == directory
        assert load_base(str(file)).model is not None

    def test_another_file_of_the_same_name_is_another_base(self, file, written, tmp_path):
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        assert gguf.dequantized(copy) == gguf.dequantized(file)
        copy.write_bytes(written[1].read_bytes())
        assert gguf.dequantized(copy) != gguf.dequantized(file)

    def test_without_a_cache_that_can_be_written_each_process_has_one(
        self, file, tmp_path, monkeypatch, caplog
    ):
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.setattr(gguf, "user_cache_path", lambda _: blocked)
        directory = gguf.dequantized(file)
        assert (directory / "config.json").is_file()
        assert gguf.dequantized(file) == directory
        assert "XDG_CACHE_HOME" in caplog.text
        assert blocked.read_text() == ""


class TestErrors:
    def refused(self, file, kind, cache):
        before = sorted(cache.rglob("config.json"))
        with pytest.raises(kind) as error:
            load_base(str(file))
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        assert sorted(cache.rglob("config.json")) == before  # nothing half-written is left
        return str(error.value)

    def test_not_a_gguf_file(self, tmp_path, cache):
        file = tmp_path / "model.gguf"
        file.write_text("not a model")
        assert "not a GGUF file" in self.refused(file, LoragenError, cache)

    @pytest.mark.parametrize("end", [5000, -100], ids=["metadata", "tensors"])
    def test_a_file_that_is_cut(self, file, tmp_path, cache, end):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[:end])
        assert "does not load" in self.refused(cut, LoragenError, cache)

    def test_an_architecture_that_transformers_does_not_know(self, base_dir, tmp_path, cache):
        file = write_gguf(base_dir, tmp_path / "new.gguf", architecture="none-such")
        assert "architecture none-such" in self.refused(file, LoragenError, cache)

    def test_weights_that_are_missing(self, base_dir, tmp_path, cache):
        """transformers would leave random weights in their place."""
        left_out = ("blk.1.attn_q.weight",)
        file = write_gguf(base_dir, tmp_path / "part.gguf", leave_out=left_out)
        text = self.refused(file, LoragenError, cache)
        assert "model.layers.1.self_attn.q_proj.weight" in text
        assert "merged" in text

    def test_without_the_extra(self, written, tmp_path, cache, monkeypatch):
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(written[0].read_bytes() + b"\0")  # not dequantised before
        monkeypatch.setattr(gguf, "find_spec", lambda _: None)
        assert "pip install" in self.refused(copy, UsageError, cache)


class TestNames:
    def test_a_gguf_file_is_a_path(self, file, tmp_path, monkeypatch):
        monkeypatch.chdir(file.parent)
        assert resolve_base(file.name) == file.name
        assert absolute_base(file.name) == str(file)
        assert is_local(file.name)
        assert is_path("none.gguf")
        assert not is_local("none.gguf")
        with pytest.raises(UsageError, match=r"none\.gguf: no such file"):
            resolve_base("none.gguf")
        link = tmp_path / "link.gguf"
        link.symlink_to(file)
        assert same_base(file.name, str(link))

    def test_other_files_are_refused(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_text("")
        with pytest.raises(UsageError, match="neither a directory nor a GGUF file"):
            resolve_base(str(file))

    def test_the_gguf_file_of_a_directory_is_named(self, file):
        with pytest.raises(UsageError, match=r"no config\.json; for its GGUF file give .*F32"):
            resolve_base(str(file.parent))


class TestCard:
    def test_it_names_what_the_file_says(self, file):
        gguf.dequantized(file)
        assert 'base_model: "makers/tiny"\n' in front_matter(str(file))
        text = describe_base(str(file))
        for part in (file.name, "Tiny", "The makers", "tuned from Tinier", "dequantised"):
            assert part in text

    def test_a_file_without_such_metadata_is_named_itself(self, written):
        gguf.dequantized(written[1])
        assert "base_model:" not in front_matter(str(written[1]))
        assert describe_base(str(written[1])).startswith(f"{written[1].name} (a GGUF file")
        assert str(written[1].parent) not in describe_base(str(written[1]))

    def test_a_file_of_another_machine(self):
        assert "base_model:" not in front_matter("/elsewhere/m.gguf")
        assert describe_base("/elsewhere/m.gguf").startswith("m.gguf (a GGUF file")


def test_a_user_trains_evaluates_and_merges(file, dataset, tmp_path, monkeypatch):
    """And plain PEFT loads the adapter as its card says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    base, rows = ["--base-model", str(file)], str(dataset())
    tiny = [
        "--test-mode",
        "--set",
        "final_model=merged",
        "--set",
        "loggers={}",
        "--set",
        "trainer.accelerator=cpu",
        "--json",
    ]
    trained = runner.invoke(app, ["lora", "train", *base, "--dataset", rows, *tiny])
    assert trained.exit_code == 0, trained.output
    (document,) = json.loads(trained.stdout)
    run = Path(document["run"])
    assert document["base_model"] == str(file)
    scored = runner.invoke(
        app, ["lora", "eval", "--adapter", str(run / "adapter"), "--dataset", rows, "--json"]
    )
    assert json.loads(scored.stdout)["base_model"] == str(file)
    merged = runner.invoke(app, ["lora", "export", str(run), "--merge", "-o", "merged"])
    assert merged.exit_code == 0, merged.output

    card = (run / "adapter" / "README.md").read_text("utf-8")
    assert how_to_load(str(file)) in card
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    adapted = PeftModel.from_pretrained(plain, run / "adapter").eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        for directory in ("merged", run / "final_model"):
            model = AutoModelForCausalLM.from_pretrained(directory)
            torch.testing.assert_close(model(ids).logits, expected)
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text("utf-8"))
