import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, Event
from time import sleep

import numpy as np
import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.config.schema import GenDataSection, SourceSection
from loragen.core.data.dataset import Dataset
from loragen.core.data.prompts import Grouping, prepare, read_prepared
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256
from loragen.core.learning import arrays as module
from loragen.core.learning.arrays import source_arrays, write_once
from loragen.core.learning.plan import make_plan
from loragen.core.learning.sources import (
    PromptDirectories,
    check_sources,
    open_source,
    open_sources,
)
from loragen.core.learning.texts import texts_of
from loragen.core.learning.train import training_base
from loragen.core.lora.provenance import traced_run
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import (
    LoraManifest,
    TrialRecord,
    checkpoint_step,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


@pytest.fixture
def copied(collection, tmp_path):
    """A copy of the colours' run whose dataset is a copy too: `(run, dataset)`."""
    run = shutil.copytree(collection.runs["colors"], tmp_path / "run")
    file = shutil.copy(collection.file("colors"), tmp_path / "copy.jsonl")
    manifest = read_manifest(run, LoraManifest)
    manifest.dataset.path = str(file)
    write_manifest(run, manifest)
    return run, tmp_path / "copy.jsonl"


class Encoder:
    """Counts its texts; a text becomes its length and its last character."""

    dim = 2
    frozen = True
    fingerprint = "weights"

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        values = [[[float(len(text)), float(ord(text[-1]))]] for text in texts]
        return torch.tensor(values), torch.ones(len(texts), 1, dtype=torch.bool)


def plan(config):
    return make_plan(config, open_sources(config))


def source(limit=50, **config):
    return open_source(SourceSection(**config), PromptDirectories(GenDataSection()), limit)


def checked(config):
    """What `gen train` checks first: the problems, or a report of the sources."""
    problems = check_sources(config)
    if not problems:
        open_sources(config).report()
    return problems


class TestReading:
    def test_a_run_knows_its_checkpoints_and_its_prompts(self, run, collection):
        found = source(run=str(run))
        assert found.name == "colors"
        assert [file.name for file in found.checkpoints] == [
            f"checkpoint-step-00{step}.ckpt" for step in (5, 6, 7, 8)
        ]
        assert found.prompts == [f"Question {i} about red?" for i in range(16)]
        assert found.base_model == str(collection.base)
        assert found.adapter_config == read_adapter(run / "adapter").config

    def test_the_checkpoints_folder_of_a_run_will_do(self, run):
        for config in (
            {"run": str(run / "checkpoints")},
            {"checkpoints": str(run / "checkpoints")},
        ):
            found, expected = source(**config), source(run=str(run))
            assert found.run == expected.run
            assert found.checkpoints == expected.checkpoints
            assert found.prompts == expected.prompts

    def test_only_the_newest_checkpoints_are_taken(self, run):
        found = source(run=str(run), limit=2)
        assert [file.name[-8:] for file in found.checkpoints] == ["007.ckpt", "008.ckpt"]

    @pytest.mark.parametrize("suffix", [".ndjson", ".txt"])
    def test_its_dataset_is_rows_whatever_the_files_name(self, copied, suffix):
        run, file = copied
        manifest = read_manifest(run, LoraManifest)
        manifest.dataset.path = str(file.rename(file.with_suffix(suffix)))
        write_manifest(run, manifest)
        assert source(run=str(run)).prompts == [f"Question {i} about red?" for i in range(16)]

    def test_other_prompts_may_be_named(self, run, tmp_path):
        (tmp_path / "p.txt").write_text("one\ntwo\n", encoding="utf-8")
        assert source(run=str(run), prompts=str(tmp_path / "p.txt")).prompts == ["one", "two"]

    def test_rows_that_a_run_has_left_out_do_not_stop_it(self, copied):
        run, file = copied
        file.write_text(file.read_text(encoding="utf-8") + "no row\n", encoding="utf-8")
        manifest = read_manifest(run, LoraManifest)
        manifest.dataset.sha256 = sha256(file)
        write_manifest(run, manifest)
        assert len(source(run=str(run)).prompts) == 16
        with pytest.raises(DataError, match="17: not JSON"):
            _ = source(run=str(run), prompts=str(file)).prompts

    def test_a_run_of_a_hub_dataset_reads_it_again(self, copied, monkeypatch):
        run, file = copied
        documents = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        monkeypatch.setattr("loragen.core.data.documents.read_hub", lambda *_: documents)
        manifest = read_manifest(run, LoraManifest)
        manifest.dataset.path = "hub:owner/colors@train"
        manifest.dataset.sha256 = Dataset.at(manifest.dataset.path).sha256
        write_manifest(run, manifest)
        assert len(source(run=str(run)).prompts) == 16
        documents.pop()
        with pytest.raises(DataError, match="hub:owner/colors@train has changed since the run"):
            _ = source(run=str(run)).prompts

    def test_a_folder_of_peft_adapters_with_its_prompts(self, run, tmp_path):
        for step in (2, 10, 100):
            write_adapter(tmp_path / "adapters" / f"step-{step}", read_adapter(run / "adapter"), "")
        (tmp_path / "p.txt").write_text("one\ntwo\n", encoding="utf-8")
        folder, prompts = str(tmp_path / "adapters"), str(tmp_path / "p.txt")
        found = source(checkpoints=folder, prompts=prompts, limit=2)
        assert [path.name for path in found.checkpoints] == ["step-10", "step-100"]
        assert (found.name, found.prompts) == ("adapters", ["one", "two"])
        assert found.adapter_config["r"] == 2
        with pytest.raises(UsageError, match=r"prompts .* unknown; add prompts: FILE"):
            source(checkpoints=folder)

    def test_a_dataset_that_is_gone_is_said_so_and_can_be_named_anew(self, copied, tmp_path):
        run, file = copied
        moved = shutil.move(file, tmp_path / "moved.jsonl")
        with pytest.raises(UsageError, match=r"copy\.jsonl is missing"):
            _ = source(run=str(run)).prompts
        assert len(source(run=str(run), prompts=str(moved)).prompts) == 16

    def test_a_dataset_that_has_changed_is_refused(self, copied):
        run, file = copied
        assert source(run=str(run)).prompts
        with file.open("a", encoding="utf-8") as stream:
            stream.write('{"prompt": "new", "response": "x"}\n')
        with pytest.raises(DataError, match=r"copy\.jsonl has changed since the run"):
            _ = source(run=str(run)).prompts
        assert len(source(run=str(run), prompts=str(file)).prompts) == 17

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"run": "none"}, "none: no such run directory"),
            ({"checkpoints": "none"}, "none: no such directory of checkpoints"),
            ({"run": "."}, "neither a run directory nor inside one"),
            ({"checkpoints": "."}, "no checkpoints or adapters there"),
        ],
    )
    def test_what_is_not_there_is_a_usage_error(self, tmp_path, monkeypatch, config, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=message):
            source(**config)

    def test_sources_and_checkpoint_dirs_are_used_together(self, gen_config, collection):
        animals, colors = map(str, collection.runs.values())
        config = gen_config({"sources": [{"run": animals}], "data.checkpoint_dir": colors})
        assert [source.name for source in open_sources(config).training] == ["animals", "colors"]
        config = gen_config({"sources": [], "data.checkpoint_dir": [colors, animals]})
        assert [source.name for source in open_sources(config).training] == ["colors", "animals"]
        with pytest.raises(UsageError, match="nothing to learn from"):
            open_sources(gen_config({"sources": []}))


class TestPreparedPrompts:
    @pytest.fixture
    def prompts(self, collection, tmp_path):
        sources = [Dataset(collection.file(name), name) for name in collection.names]
        prepare(sources, tmp_path / "prompts", Grouping(samples_per_prompt=2, test_ratio=0.25))
        return tmp_path / "prompts"

    def test_each_run_has_the_texts_of_its_dataset(self, prompts, gen_config):
        config = gen_config({"data.prompts": str(prompts)})
        for found in plan(config).sources:
            texts = texts_of(found)
            groups = read_prepared(prompts).groups_of(found.name)
            held = [texts.texts[i] for i in texts.val_texts]
            assert held == ["\n\n".join(group) for group in groups.val]
            assert len(held) == 2
            assert texts.texts[: -len(held)] == ["\n\n".join(group) for group in groups.train]
            assert sorted(found.prompts) == sorted(p for t in texts.texts for p in t.split("\n\n"))

    def test_the_dataset_itself_need_not_be_there(self, copied, prompts, gen_config):
        run, file = copied
        file.unlink()
        config = gen_config({"sources": [{"run": str(run)}], "data.prompts": str(prompts)})
        assert len(plan(config).sources[0].prompts) == 16

    def test_a_folder_of_adapters_has_its_own(self, run, prompts, tmp_path, collection):
        write_adapter(tmp_path / "adapters" / "one", read_adapter(run / "adapter"), "")
        single = tmp_path / "single"
        prepare([Dataset(collection.file("colors"), "colors")], single, Grouping())
        found = source(checkpoints=str(tmp_path / "adapters"), prompts=str(single))
        assert (found.name, len(found.groups.train)) == ("adapters", 3)
        with pytest.raises(UsageError, match=r"set data\.samples_per_prompt to 2"):
            source(checkpoints=str(tmp_path / "adapters"), prompts=str(prompts))


class TestTracked:
    def test_a_checkpoint_goes_with_the_rows_of_its_step(self, gen_config):
        config = gen_config({"data.pairing": "tracked", "data.prompts_per_condition": 2})
        for found in plan(config).sources:
            rows, texts = traced_run(found.run).provenance, texts_of(found)
            held = {p for i in texts.val_texts for p in texts.texts[i].split("\n\n")}
            for file, tracked in zip(found.checkpoints, texts.tracked, strict=True):
                drawn = [p for i in tracked for p in texts.texts[i].split("\n\n")]
                step = checkpoint_step(file)
                own = [row.prompt for row in rows.rows_of(step) if row.prompt not in held]
                assert drawn[: len(own)] == own
                assert len(drawn) == 4
                assert held.isdisjoint(drawn)

    def test_the_held_out_texts_are_those_of_prepared_prompts(
        self, collection, gen_config, tmp_path
    ):
        sources = [Dataset(collection.file(name), name) for name in collection.names]
        prepare(sources, tmp_path / "p", Grouping(samples_per_prompt=2, test_ratio=0.25))
        config = gen_config({"data.pairing": "tracked", "data.prompts": str(tmp_path / "p")})
        found = plan(config).sources[0]
        texts = texts_of(found)
        held = read_prepared(tmp_path / "p").groups_of(found.name).val
        assert [texts.texts[i] for i in texts.val_texts] == ["\n\n".join(group) for group in held]

    def test_a_dataset_held_out_whole_is_seen_as_by_infer(self, collection, gen_config):
        sources = [{"run": str(run)} for run in collection.runs.values()]
        ours = {"sources": sources[:1], "val_sources": sources[1:], "data.pairing": "tracked"}
        work = plan(gen_config(ours))
        assert work.sources[0].provenance is not None
        assert work.val_sources[0].provenance is None

    def test_adapters_without_steps_are_refused(self, run, tmp_path, gen_config, collection):
        write_adapter(tmp_path / "adapters" / "one", read_adapter(run / "adapter"), "")
        section = {
            "checkpoints": str(tmp_path / "adapters"),
            "prompts": str(collection.file("colors")),
        }
        with pytest.raises(UsageError, match=r"rows .* unknown; data\.pairing tracked is for"):
            plan(gen_config({"sources": [section], "data.pairing": "tracked"}))

    def test_a_converted_run_is_refused(self, copied, gen_config):
        manifest = read_manifest(copied[0], LoraManifest)
        write_manifest(copied[0], manifest.model_copy(update={"converted_from": "x"}))
        with pytest.raises(UsageError, match="converted"):
            plan(gen_config({"sources": [{"run": str(copied[0])}], "data.pairing": "tracked"}))

    def test_a_generator_learns_from_them(self, gen_config):
        """From end to end: the arrays have what the texts say."""
        config = gen_config({"data.pairing": "tracked"})
        work = plan(config)
        encoder = Encoder()
        with source_arrays(work, encoder) as (ready, _):
            for found, arrays in zip(work.sources, ready, strict=True):
                texts = texts_of(found)
                assert arrays.embeddings[:, 0, 0].tolist() == [len(text) for text in texts.texts]
                assert (arrays.val_texts, arrays.tracked) == (texts.val_texts, texts.tracked)
                assert len(arrays.tracked) == len(arrays.tokens)


class TestCommonLayout:
    def test_adapters_of_another_shape_are_refused(self, run, train_lora, gen_config):
        wide = train_lora({"lora.rank": 4}, name="wide").directory
        config = gen_config({"sources": [{"run": str(run)}, {"run": str(wide)}]})
        with pytest.raises(DataError, match=r"not the adapter of colors: .*lora_A.*has shape"):
            plan(config)

    def test_adapters_of_other_weights_of_that_name_are_refused(
        self, collection, copied, gen_config
    ):
        run = collection.runs["animals"]
        manifest = read_manifest(copied[0], LoraManifest)
        write_manifest(copied[0], manifest.model_copy(update={"base_fingerprint": "other"}))
        config = gen_config({"sources": [{"run": str(run)}, {"run": str(copied[0])}]})
        with pytest.raises(DataError, match=r"on other weights of that name: a generator serves"):
            plan(config)
        write_manifest(copied[0], manifest.model_copy(update={"base_fingerprint": ""}))
        assert len(plan(config).sources) == 2

    def test_a_base_that_has_changed_is_warned_of(self, run, copied, gen_config, caplog):
        training_base(plan(gen_config({"sources": [{"run": str(run)}]})), None)
        assert not caplog.records
        manifest = read_manifest(copied[0], LoraManifest)
        write_manifest(copied[0], manifest.model_copy(update={"base_fingerprint": "other"}))
        training_base(plan(gen_config({"sources": [{"run": str(copied[0])}]})), None)
        (record,) = caplog.records
        assert "has other weights than the one" in record.getMessage()

    def test_one_base_may_have_two_names(self, collection, copied, gen_config):
        run = collection.runs["animals"]
        manifest = read_manifest(copied[0], LoraManifest)
        write_manifest(copied[0], manifest.model_copy(update={"base_model": "a/copy/of/it"}))
        config = gen_config({"sources": [{"run": str(run)}, {"run": str(copied[0])}]})
        assert plan(config).base_model == read_manifest(run, LoraManifest).base_model

    def test_adapters_of_another_base_are_refused(self, run, copied, gen_config):
        manifest = read_manifest(copied[0], LoraManifest)
        other = {"base_model": "other/base", "base_fingerprint": "other"}
        write_manifest(copied[0], manifest.model_copy(update=other))
        config = gen_config({"sources": [{"run": str(run)}, {"run": str(copied[0])}]})
        with pytest.raises(DataError, match=r"other/base.*a generator serves one base model"):
            plan(config)

    def test_one_checkpoint_of_another_shape_is_found(self, run, copied, train_lora, gen_config):
        """Not only the last one of a source is looked at before it is learned from."""
        wide = train_lora({"lora.rank": 4}, name="wide").directory
        name = "checkpoints/checkpoint-step-006.ckpt"
        shutil.copy(wide / name, copied[0] / name)
        config = gen_config({"sources": [{"run": str(copied[0])}]})
        work = plan(config)
        with (
            pytest.raises(DataError, match=r"checkpoint-step-006\.ckpt: r is 2 for .* have rank 4"),
            source_arrays(work, Encoder()),
        ):
            pass

    def test_the_plan_is_told_in_a_line(self, gen_config):
        summary = plan(gen_config()).summary()
        assert summary.startswith("2 datasets, 8 checkpoints of 1,856 values -> ")
        assert "tokens of 16" in summary

    def test_too_few_tokens_are_refused_before_anything_is_written(self, gen_config, tmp_path):
        with pytest.raises(UsageError, match=r"layout\.max_seq_len is 3"):
            plan(gen_config({"layout.max_seq_len": 3}))
        assert not (tmp_path / "cache").exists()


class TestPrepared:
    @pytest.fixture
    def ready(self, gen_config):
        """`ready(encoder)` prepares the collection and returns copies of the arrays."""

        def prepare(encoder, config=None):
            config = config or gen_config()
            work = plan(config)
            with source_arrays(work, encoder) as (found, _):
                return [
                    (s.name, np.array(s.tokens), np.array(s.embeddings), np.array(s.mask))
                    for s in found
                ]

        return prepare

    def test_the_arrays_are_the_checkpoints_and_the_embedded_texts(self, ready, gen_config):
        encoder = Encoder()
        work = plan(gen_config())
        for (name, tokens, embeddings, mask), wanted in zip(
            ready(encoder), work.sources, strict=True
        ):
            assert name == wanted.name
            for packed, file in zip(tokens, wanted.checkpoints, strict=True):
                unpacked = work.layout.unpack(torch.from_numpy(packed))
                assert all(unpacked[k].equal(t) for k, t in load_adapter(file).tensors.items())
            assert embeddings.shape == (8, 1, 2)  # 16 rows, two to a text
            assert mask.all()
        assert len(encoder.texts) == 16
        assert all(text.count("\n\n") == 1 for text in encoder.texts)

    def test_the_second_time_no_checkpoint_is_read_and_nothing_embedded(self, ready, monkeypatch):
        first = ready(Encoder())
        encoder = Encoder()

        monkeypatch.setattr(module, "in_form", lambda *_: pytest.fail("packed again"))
        second = ready(encoder)
        assert encoder.texts == []
        for one, other in zip(first, second, strict=True):
            assert one[0] == other[0]
            assert all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))

    def test_another_encoder_embeds_anew(self, ready):
        ready(Encoder())
        other = Encoder()
        other.fingerprint = "other weights"
        ready(other)
        assert len(other.texts) == 16

    @pytest.mark.parametrize("name", ["CACHE_VERSION", "PACKING_VERSION"])
    def test_another_version_of_the_code_reads_no_old_cache(
        self, ready, monkeypatch, name, tmp_path
    ):
        ready(Encoder())
        before = {*(tmp_path / "cache" / "tokens").glob("*.npy")}
        monkeypatch.setattr(module, name, 99)
        encoder = Encoder()
        ready(encoder)
        after = {*(tmp_path / "cache" / "tokens").glob("*.npy")}
        assert len(after) == 2 * len(before)
        assert len(encoder.texts) == (16 if name == "CACHE_VERSION" else 0)

    def test_another_version_of_a_library_embeds_anew(self, ready, monkeypatch):
        first, second = Encoder(), Encoder()
        first.libraries = second.libraries = ("torch",)
        ready(first)
        monkeypatch.setattr(module, "version", lambda name: f"{name} 99")
        ready(second)
        assert len(second.texts) == 16

    def test_what_a_killed_process_has_left_is_removed(self, ready, tmp_path):
        ready(Encoder())
        left = []
        for folder in ("tokens", "embeddings"):
            file = min((tmp_path / "cache" / folder).glob("*.npy"))
            file.unlink()
            left.append(file.with_name(f".{file.name}.abc.unfinished"))
            left[-1].mkdir()
            (left[-1] / "half.npy").touch()
        ready(Encoder())
        assert not any(folder.exists() for folder in left)

    def test_processes_that_write_different_arrays_do_not_wait(self, tmp_path):
        files = [tmp_path / "cache" / name for name in ("a.npy", "b.npy")]
        writing = Barrier(2)

        def write(file):
            writing.wait(9)
            file.touch()

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(write_once, [f], partial(write, f)) for f in files]:
                done.result(9)
        assert all(file.is_file() for file in files)

    def test_one_process_writes_and_the_others_wait(self, tmp_path, caplog):
        """Threads hold the lock of a file as processes do."""
        caplog.set_level(logging.INFO)
        file, writing, written = tmp_path / "cache" / "a.npy", Event(), []

        def write():
            written.append(1)
            writing.set()
            sleep(1.2)
            file.touch()

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(write_once, [file], write)
            writing.wait(9)
            second = pool.submit(write_once, [file], write)
            first.result(9)
            second.result(9)
        assert written == [1]
        assert "waiting for another process" in caplog.text
        write_once([file], write)
        assert written == [1]

    def test_prompts_do_not_stay_in_memory(self, gen_config):
        work = plan(gen_config())
        with source_arrays(work, Encoder()):
            assert not any({"prompts", "groups"} & vars(one).keys() for one in work.sources)

    def test_a_cache_that_is_thrown_away_is_made_again(self, ready, tmp_path):
        first = ready(Encoder())
        shutil.rmtree(tmp_path / "cache")
        second = ready(Encoder())
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, second, strict=True))

    def test_without_a_cache_nothing_is_left(self, ready, gen_config, tmp_path):
        ready(Encoder(), config=gen_config({"data.cache_tokenized": False}))
        assert not (tmp_path / "cache").exists()

    def test_a_checkpoint_that_is_not_finite_is_refused(self, copied, gen_config, tmp_path):
        run, _ = copied
        file = run / "checkpoints" / "checkpoint-step-006.ckpt"
        document = torch.load(file, weights_only=True)
        next(iter(document["state_dict"].values()))[0, 0] = float("nan")
        torch.save(document, file)
        config = gen_config({"sources": [{"run": str(run)}]})
        work = plan(config)
        with (
            pytest.raises(DataError, match=r"checkpoint-step-006\.ckpt: NaN or infinity"),
            source_arrays(work, Encoder()),
        ):
            pass
        assert not list((tmp_path / "cache" / "tokens").rglob("*"))


@pytest.fixture
def names(gen_config):
    """`names(DIR, ...)`: the runs that `data.checkpoint_dir` gives."""

    def found(*directories):
        settings = {"sources": [], "data.checkpoint_dir": [str(one) for one in directories]}
        return [Path(s.section.run).name for s in open_sources(gen_config(settings)).training]

    return found


TEST = {"max_steps": 6, "steps": [4, 5, 6]}
OLD, NEW = {"started": "2025-01-01T00:00:00+00:00"}, {"started": "2025-02-01T00:00:00+00:00"}


class TestFolders:
    def test_of_one_dataset_the_newest_run_is_taken(self, runs, names):
        runs("a", **NEW)
        runs("b", **OLD)
        runs("c", "animals", **OLD)
        assert names(runs.folder) == ["a", "c"]

    def test_another_base_or_shape_is_another_thing(self, runs, names, collection):
        config = read_manifest(collection.runs["colors"], LoraManifest).adapter_config
        runs("a")
        runs("b", base_model="other")
        runs("c", adapter_config={**config, "r": 64})
        runs("d", adapter_config={**config, "target_modules": ["q_proj"]})
        assert names(runs.folder) == ["a", "b", "c", "d"]

    def test_a_dataset_that_moved_or_was_edited_is_the_same(self, runs, names, collection):
        data = read_manifest(collection.runs["colors"], LoraManifest).dataset
        runs("a", **OLD, dataset=data.model_copy(update={"path": "/elsewhere/colors.jsonl"}))
        runs("b", **OLD, dataset=data.model_copy(update={"sha256": "edited"}))
        runs("c", **OLD, dataset=data.model_copy(update={"path": "", "sha256": ""}))
        runs("d", **NEW)
        assert names(runs.folder) == ["d"]

    def test_two_datasets_of_one_name_are_not_taken_for_one(self, runs, names, collection):
        data = read_manifest(collection.runs["colors"], LoraManifest).dataset
        other = data.model_copy(update={"path": "/other/colors.jsonl", "sha256": "other"})
        one, two = runs("a", **OLD, dataset=other), runs("b", **NEW)
        with pytest.raises(UsageError) as raised:
            names(runs.folder)
        assert all(
            str(one) in str(raised.value) for one in (one, two, "/other/colors.jsonl", data.path)
        )
        assert names(runs.folder, one) == ["a"]
        assert names(runs.folder, one, two) == ["a", "b"]

    def test_tests_and_unfinished_runs_are_left_out(self, runs, names):
        for name, changes in {
            "a": OLD,
            "b": NEW | TEST,
            "c": NEW | {"status": "interrupted"},
            "d": NEW | {"status": "running"},
        }.items():
            runs(name, **changes)
        assert names(runs.folder) == ["a"]

    def test_trials_of_a_sweep_are_left_out_unless_named(self, runs, names):
        trial = {"trial": TrialRecord(study="/study", number=3)}
        runs("a", **OLD)
        named = runs("b", **NEW | trial)
        runs("c", **NEW | trial | {"status": "interrupted"})
        assert names(runs.folder) == ["a"]
        assert names(named) == ["b"]

    def test_what_is_named_is_taken(self, runs, names):
        runs("a", **NEW)
        for name, changes in (("b", TEST), ("c", {"status": "failed"}), ("d", OLD)):
            named = runs(name, **changes)
            assert names(named) == [name]
            assert names(runs.folder, named / "checkpoints")[0] == "checkpoints"
            assert len(names(runs.folder, named)) == 1, "the folder has another of that dataset"

    def test_what_is_held_out_is_not_learned_from(self, runs, gen_config):
        runs("a", **NEW)
        held = runs("b", "animals", **OLD)
        runs("c", "animals", **NEW)
        config = {"data.checkpoint_dir": str(runs.folder), "val_sources": [{"run": str(held)}]}
        found = open_sources(gen_config({"sources": [], **config}))
        assert [Path(one.section.run).name for one in found.training] == ["a"]
        assert [directory.name for directory in found.superseded] == ["c"]
        with pytest.raises(UsageError, match="b is named twice"):
            open_sources(gen_config({"sources": [{"run": str(held)}], **config}))

    def test_a_folder_with_nothing_to_learn_from_is_refused(self, runs, names):
        runs("a", **TEST)
        runs("b", status="interrupted")
        with pytest.raises(UsageError, match=r"none of its 2 runs .*1 not finished, 1 of --test"):
            names(runs.folder)

    def test_a_run_named_twice_is_refused(self, runs, names):
        run = runs("a")
        with pytest.raises(UsageError, match="a is named twice"):
            names(run, run / "checkpoints")


@pytest.fixture
def check(gen_config, collection):
    """`check(prompts)`: of a run whose prompts are elsewhere."""
    run = str(collection.runs["colors"])
    return lambda prompts: checked(gen_config({"sources": [{"run": run, "prompts": prompts}]}))


class TestReport:
    def test_what_is_named_is_not_told_to_be_left_out(self, runs, gen_config, caplog):
        folder, run = str(runs.folder), runs("a", status="failed")
        checked(gen_config({"sources": [], "data.checkpoint_dir": [folder, str(run)]}))
        (message,) = caplog.messages
        assert message.startswith(f"{run}: not finished")

    def test_one_line_tells_of_each_kind_left_out(self, runs, gen_config, caplog):
        for name, changes in {
            "a": NEW,
            **{f"b{i}": OLD for i in range(7)},
            "c": TEST,
            "d": {"status": "failed"},
            "e": {"status": "running"},
        }.items():
            runs(name, **changes)
        with caplog.at_level(logging.INFO, "loragen"):
            checked(gen_config({"sources": [], "data.checkpoint_dir": str(runs.folder)}))
        unfinished, tests, superseded = caplog.messages
        assert f"{runs.folder / 'd'}, {runs.folder / 'e'}: left out" in unfinished
        assert f"{runs.folder / 'c'}: left out" in tests
        assert "b4 and 2 more: left out" in superseded
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]

    def test_an_unfinished_run_that_is_named_is_taken_with_a_warning(
        self, runs, gen_config, caplog
    ):
        run = runs("a", status="interrupted")
        checked(gen_config({"sources": [{"run": str(run)}]}))
        (message,) = caplog.messages
        assert message.startswith(f"{run}: not finished")


def test_prompts_may_be_on_the_hub(check):
    check("hub:openai/gsm8k:main")


@pytest.mark.parametrize(
    "prompts, message",
    [("none.txt", "none.txt: no such prompt file"), ("hub:gsm8k", "hub:gsm8k: expected hub:owner")],
)
def test_prompts_that_cannot_be_are_refused(check, prompts, message):
    ((keys, problem),) = check(prompts)
    assert keys == ("sources", 0, "prompts")
    assert problem.startswith(message)


class TestPreparedDirectories:
    @pytest.fixture
    def prompts(self, collection, tmp_path):
        """A directory of both datasets' prompts, two to a text."""
        sources = [Dataset(collection.file(name), name) for name in collection.names]
        prepare(sources, tmp_path / "prompts", Grouping(samples_per_prompt=2))
        return tmp_path / "prompts"

    def test_it_is_looked_at_before_anything_heavy(self, prompts, gen_config, check):
        checked(gen_config({"data.prompts": str(prompts)}))
        check(str(prompts))

    def test_texts_of_another_size_are_refused(self, prompts, gen_config):
        config = {"data.prompts": str(prompts), "data.samples_per_prompt": 4}
        with pytest.raises(UsageError, match=r"with 2 samples per prompt: set data\.samples_"):
            checked(gen_config(config))

    def test_every_dataset_must_be_there(self, collection, tmp_path, gen_config, check):
        source = Dataset(collection.file("animals"), "animals")
        prepare([source], tmp_path / "p", Grouping(samples_per_prompt=2))
        with pytest.raises(UsageError, match=r"no prompts of the dataset 'colors' in it.*animals"):
            checked(gen_config({"data.prompts": str(tmp_path / "p")}))
        check(str(tmp_path / "p"))  # named for a run, whatever it is called

    def test_two_datasets_of_one_name_need_prompts_of_their_own(self, runs, prompts, gen_config):
        data = read_manifest(runs("a"), LoraManifest).dataset
        other = data.model_copy(update={"path": "/other/colors.jsonl", "sha256": "other"})
        sources = [{"run": str(runs.folder / "a")}, {"run": str(runs("b", dataset=other))}]
        config = {"data.prompts": str(prompts), "sources": sources}
        with pytest.raises(UsageError, match=r"called colors: .*data\.prompts"):
            checked(gen_config(config))
        sources[1]["prompts"] = str(prompts)
        checked(gen_config(config))

    def test_a_directory_that_is_not_prepared(self, tmp_path, gen_config, check):
        with pytest.raises(UsageError, match=r"no prepared\.json"):
            check(str(tmp_path))
        ((keys, problem),) = checked(gen_config({"data.prompts": "none"}))
        assert keys == ("data", "prompts")
        assert problem.startswith("none: no such directory of prompts")
