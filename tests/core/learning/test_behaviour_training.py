"""Training through the base model, from the first step to the generator's file."""

import json
import shutil

import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.base import load as precision
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError, UsageError
from loragen.core.generator.generated import adapter_card
from loragen.core.generator.model import Generator
from loragen.core.learning.objectives.transfer import Transfer
from loragen.core.learning.sources import open_sources
from loragen.core.learning.texts import labelled_rows
from loragen.core.learning.train import GeneratorPoint, train
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import (
    GENERATOR_FILE,
    GeneratorManifest,
    checkpoint_files,
    read_manifest,
)
from loragen.core.run.metrics import read_metrics
from tests.conftest import (
    COLORS,
    TRANSFER,
    configured,
    generator_settings,
    rows_of,
    write_lines,
)
from tests.core.learning.test_resume import Kill, StopAt, assert_equal

BOTH = "reconstruction-then-behaviour"
SMALL = {
    "training.objective": BOTH,
    "training.max_epochs": 2,  # 4 steps
    "training.val_rows": 4,
    "behaviour.max_steps": 4,
    "behaviour.batch_size": 2,
    "behaviour.rows_per_adapter": 2,
    "behaviour.max_length": 64,
    "behaviour.learning_rate": 1e-2,
}


def automatic(collection, sbert_dir, home):
    """A short training by transfer that chooses its decoder."""
    ours = {**generator_settings(collection, sbert_dir, home), **SMALL}
    plain = {key: value for key, value in ours.items() if not key.startswith("decoder.")}
    return {**plain, "training.objective": "transfer", "decoder": {"name": "auto"}}


@pytest.fixture(scope="module")
def trained(collection, sbert_dir, tmp_path_factory):
    """`trained({...})` trains in both phases, 4 steps each, once, and gives the run. Nobody writes
    to it."""
    home = tmp_path_factory.mktemp("behaviour")
    ours = {**generator_settings(collection, sbert_dir, home), **SMALL}
    runs = {}

    def run(settings=None):
        key = json.dumps(settings or {}, sort_keys=True)
        if key not in runs:
            config = configured(GenTrainConfig, {**ours, **(settings or {})})
            runs[key] = train(config, Silent())
        return runs[key]

    return run


def provenance(run):
    return torch.load(run.directory / GENERATOR_FILE, weights_only=True)["provenance"]


def logged(run, name):
    """Step -> the metric."""
    entries = read_metrics(run.directory / "metrics.jsonl")
    return {entry["step"]: entry[name] for entry in entries if name in entry}


@pytest.fixture
def colors_held_out(collection):
    animals, colors = (str(run) for run in collection.runs.values())
    return {"sources": [{"run": animals}], "val_sources": [{"run": colors}]}


class TestObjectives:
    def test_a_transfer_in_double_precision(self, trained):
        run = trained(
            {
                **TRANSFER,
                "trainer.precision": "64-true",
            }
        )
        assert run.manifest.status == "success"

    def test_a_mixture_is_saved_with_the_adapters_that_it_combines(
        self, trained, collection, tmp_path
    ):
        run = trained({"training.objective": "transfer", **TRANSFER})
        results = tmp_path / "moved"
        shutil.copytree(run.directory / "results" / "final_model", results)
        assert sorted(file.name for file in results.iterdir()) == [
            "generator_model.collected.safetensors",
            "generator_model.pt",
        ]
        generator = Generator.load(results / "generator_model.pt")
        adapter = generator.generate(["Question 1 about red?"])
        shares = adapter.origin.coefficients
        assert shares.keys() == {"animals", "colors"}
        assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
        collected = {
            name: [load_adapter(file).tensors for file in checkpoint_files(run)]
            for name, run in collection.runs.items()
        }
        for key, made in adapter.tensors.items():
            means = {
                name: torch.stack([t[key] for t in c]).mean(0) for name, c in collected.items()
            }
            expected = sum(shares[name] * mean for name, mean in means.items())
            assert made.allclose(expected, atol=2e-3), key  # coefficients are rounded
        card = adapter_card(adapter.origin)
        assert "**method**: An affine combination of the collected adapters" in card
        assert "trained for 4 steps of transfer" in card
        assert "**largest coefficients**: " in card
        for checkpoint in (run.directory / "checkpoints").iterdir():
            assert Generator.load(checkpoint).generate(["red?"]).origin.coefficients
        (results / "generator_model.collected.safetensors").unlink()
        with pytest.raises(DataError, match=r"generator_model\.pt: .*adapters are missing"):
            Generator.load(results / "generator_model.pt")

    @pytest.mark.parametrize(
        ("right", "decoder"),
        [((0.5, 0.7), "neighbours"), ((0.6, 0.7), "mixture"), ((0.0, 0.01), "neighbours")],
    )
    def test_auto_is_mixture_where_it_makes_the_adapters_of_left_out_datasets(
        self, collection, sbert_dir, tmp_path, monkeypatch, caplog, right, decoder
    ):
        monkeypatch.setattr(Transfer, "accuracy_on_left_out", lambda *_: right)
        settings = automatic(collection, sbert_dir, tmp_path)
        with caplog.at_level("INFO", "loragen"):
            run = train(configured(GenTrainConfig, settings), Silent())
        assert f"{100 * right[1]:.1f}% with the dataset's own" in caplog.text
        warned = [one for one in caplog.records if "of their own training rows" in one.message]
        assert [one.levelname for one in warned] == ["WARNING"] * (right[1] < 0.05)
        assert run.config.decoder.name == Generator.load(run.directory).decoder.name == decoder
        assert {one.name for one in run.manifest.plugins if one.kind == "decoder"} == {decoder}
        point = GeneratorPoint.find(run.directory)
        assert point.resumed(configured(GenTrainConfig, settings)).decoder.name == decoder

    def test_auto_compares_with_the_collected_adapters_as_they_are(
        self, collection, sbert_dir, tmp_path, monkeypatch
    ):
        """The base is asked twice for each dataset: as predicted, and as collected."""
        asked, compare = [], Transfer.accuracy_on_left_out

        def comparing(objective, network):
            loss = objective.base_loss
            answered = loss.accuracy
            monkeypatch.setattr(
                loss, "accuracy", lambda *given: asked.append(given[0]) or answered(*given)
            )
            found = compare(objective, network)
            for source, adapter in zip(objective.data.sources, asked[1::2], strict=True):
                expected = torch.tensor(source.tokens[-1])
                assert loss.normalization.denormalize(adapter[0]).allclose(expected, atol=1e-5)
            return found

        monkeypatch.setattr(Transfer, "accuracy_on_left_out", comparing)
        settings = automatic(collection, sbert_dir, tmp_path)
        train(configured(GenTrainConfig, settings), Silent())
        assert len(asked) >= 4

    def test_shares_of_neighbours_sum_to_1_with_that_of_all_datasets(self, trained):
        run = trained({**TRANSFER, "decoder": {"name": "neighbours", "temperature": 1.0}})
        found = Generator.load(run.directory).generate(["Question 1 about red?"])
        shares = found.origin.coefficients
        assert shares.keys() == {"animals", "colors", "all datasets together"}
        assert sum(shares.values()) == pytest.approx(1, abs=2e-3)

    @pytest.mark.parametrize(
        ("objective", "trained_for"),
        [
            ("reconstruction", "4 steps of reconstruction"),
            ("behaviour", "4 steps of behaviour"),
            (BOTH, "4 steps of reconstruction, then 4 steps of behaviour"),
            ("transfer", "4 steps of transfer"),
        ],
    )
    def test_each_is_trained(self, trained, objective, trained_for):
        more = TRANSFER if objective == "transfer" else {}
        run = trained({"training.objective": objective, **more})
        has_base = objective != "reconstruction"
        assert run.manifest.steps == (8 if objective == BOTH else 4)
        assert provenance(run)["trained_for"] == trained_for
        metric = "val/behaviour" if has_base else "val/loss"
        assert metric in provenance(run)["chosen_by"]
        assert {"val/loss", "val/relative_error"} <= run.manifest.metrics.keys()
        assert ({"val/behaviour", "val/accuracy"} <= run.manifest.metrics.keys()) is has_base
        assert ("train/behaviour" in run.manifest.metrics) is has_base
        (best,) = run.directory.glob("checkpoints/epoch=*")
        assert ("val_behaviour=" in best.name) is has_base

    def test_a_step_is_logged_for_what_it_was_trained_on(self, trained):
        run = trained()
        assert list(logged(run, "train/behaviour")) == [5, 6, 7, 8]
        assert list(logged(run, "train/mse")) == list(range(1, 9))
        assert list(logged(run, "val/behaviour")) == [2, 4, 6, 8]
        loss, behaviour, mse, l1 = (
            logged(run, f"train/{name}")[6] for name in ("loss", "behaviour", "mse", "l1")
        )
        assert loss == pytest.approx(behaviour + 0.1 * (mse + 0.1 * l1), rel=1e-5)

    def test_without_a_share_of_reconstruction_there_is_none(self, trained):
        """Nothing of the phase before stays in the metrics."""
        run = trained({"behaviour.reconstruction_weight": 0})
        assert list(logged(run, "train/mse")) == [1, 2, 3, 4]
        assert logged(run, "train/loss")[8] == logged(run, "train/behaviour")[8]
        assert "train/mse" not in run.manifest.metrics

    def test_each_phase_has_its_own_rates_from_its_start(self, trained):
        rates = logged(trained({"schedule.name": "constant"}), "train/lr")
        assert list(rates.values()) == [1e-2] * 8
        rates = logged(trained({"behaviour.learning_rate": 5e-3}), "train/lr")
        first, second = [rates[step] for step in range(1, 5)], [rates[s] for s in range(5, 9)]
        assert second == pytest.approx([0.5 * rate for rate in first])

    def test_a_phase_that_made_it_worse_is_told(self, gen_config, caplog):
        settings = {"behaviour.learning_rate": 0.3, "behaviour.max_steps": 2}
        train(gen_config({**SMALL, **settings}), Silent())
        (warning,) = [one for one in caplog.messages if "increased" in one]
        assert warning.startswith("val/behaviour increased during the phase behaviour")
        assert "of reconstruction" in warning

    def test_what_was_auto_is_kept_as_what_it_came_to(self, gen_config, trained):
        run = trained({"training.objective": "auto"})
        point = GeneratorPoint.find(run.directory)
        assert point.config.training.objective == BOTH
        again = point.resumed(gen_config({**SMALL, "training.objective": "auto"}))
        assert again.training.objective == BOTH

    def test_held_out_datasets_decide(self, trained, colors_held_out):
        run = trained(colors_held_out)
        assert "val_unseen/behaviour" in provenance(run)["chosen_by"]
        assert {"val_unseen/accuracy", "val/accuracy"} <= run.manifest.metrics.keys()

    def test_held_out_datasets_without_labels_are_reconstructed(
        self, trained, collection, tmp_path
    ):
        adapter = read_adapter(collection.runs["colors"] / "adapter")
        write_adapter(tmp_path / "colors", adapter, "")
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("What?\nWhich?\nWho?\n", encoding="utf-8")
        held_out = {"checkpoints": str(tmp_path / "colors"), "prompts": str(prompts)}
        animals = {"run": str(collection.runs["animals"])}
        run = trained({"sources": [animals], "val_sources": [held_out]})
        assert "val_unseen/loss" in provenance(run)["chosen_by"]
        assert "val/accuracy" in run.manifest.metrics
        assert "val_unseen/accuracy" not in run.manifest.metrics

    def test_a_base_that_is_gone_leaves_nothing(self, gen_config, tmp_path):
        settings = {**SMALL, "behaviour.base_model": str(tmp_path / "none")}
        with pytest.raises(UsageError, match="none: no such directory"):
            train(gen_config(settings), Silent())
        assert not (tmp_path / "experiments").exists()


class TestLearning:
    def test_the_base_answers_better_with_what_is_generated(self, trained):
        """The loss on rows that are learned from falls, and the base itself stays as it is."""
        run = trained(
            {
                "training.objective": "behaviour",
                "behaviour.max_steps": 30,
                "behaviour.rows_per_adapter": 8,
                "behaviour.reconstruction_weight": 0,
                "data.val_ratio": 0.0,
            }
        )
        losses = list(logged(run, "train/behaviour").values())
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    def test_accumulation_only_splits_the_work(self, trained):
        found = []
        for size, accumulation in ((4, 1), (2, 2)):
            settings = {
                "behaviour.batch_size": size,
                "trainer.accumulate_grad_batches": accumulation,
            }
            found.append(trained({"data.batch_size": size, **settings}))
        one, other = (logged(run, "train/loss") for run in found)
        assert one.keys() == other.keys()
        assert list(one.values()) == pytest.approx(list(other.values()), rel=1e-4)

    def test_rows_of_held_out_prompts_are_not_learned_from(self, gen_config, tokenizer):
        config = gen_config(SMALL)
        for source in open_sources(config).training:
            val = [prompt for group in source.groups.val for prompt in group]
            rows = labelled_rows(source, val, tokenizer, 64, 1)
            ids = [{tuple(row.ids) for row in part} for part in (rows.training, rows.validation)]
            assert not ids[0] & ids[1]
            assert len(rows.training) + len(rows.validation) == 16
            assert len(rows.validation) == 4  # 2 of 8 texts of two prompts


class TestResume:
    @pytest.mark.parametrize(
        ("step", "settings"),
        [
            *((step, {"decoder.dropout": 0.2}) for step in (4, 5, 6, 8)),
            (6, {"behaviour.reconstruction_weight": 0.0, "training.target_noise": 0.1}),
            (6, {"encoder.frozen": False}),
            (6, {"training.ema_decay": 0.5, "trainer.accumulate_grad_batches": 2}),
        ],
    )
    def test_it_is_exact_across_the_phases(self, gen_config, trained, tmp_path, step, settings):
        settings = {"training.last_every": 1, **settings}
        run = trained(settings)
        whole = run.directory
        with pytest.raises(Kill):
            train(gen_config({**SMALL, **settings}), StopAt(step))
        (killed,) = (tmp_path / "experiments").iterdir()
        rest = StopAt()
        train(gen_config({**SMALL, **settings}), rest, GeneratorPoint.find(killed))
        assert rest.steps == list(range(step, run.manifest.steps + 1))
        assert_equal(whole, killed)

    def test_auto_goes_on_as_it_began(self, gen_config, tmp_path):
        settings = {**SMALL, "training.objective": "auto", "training.last_every": 1}
        with pytest.raises(Kill):
            train(gen_config(settings), StopAt(6))
        (killed,) = (tmp_path / "experiments").iterdir()
        rest = StopAt()
        run = train(gen_config(settings), rest, GeneratorPoint.find(killed))
        assert rest.steps == [6, 7, 8]
        assert read_manifest(run.directory, GeneratorManifest).status == "success"

    def test_other_labels_of_the_same_prompts_are_refused(self, gen_config, collection, tmp_path):
        """Adapters with a file of rows: the prompts are compared, and so are the answers."""
        adapter = read_adapter(collection.runs["colors"] / "adapter")
        write_adapter(tmp_path / "colors", adapter, "")
        rows = write_lines(tmp_path / "rows.jsonl", rows_of(COLORS))
        source = {"checkpoints": str(tmp_path / "colors"), "prompts": str(rows)}
        animals = {"run": str(collection.runs["animals"])}
        config = gen_config(
            {**SMALL, "sources": [animals, source], "behaviour.base_model": str(collection.base)}
        )
        run = train(config, Silent()).directory
        write_lines(rows, rows_of(COLORS[::-1]))
        text = rows.read_text(encoding="utf-8").replace("about blue", "about red")
        rows.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError) as raised:
            train(config, Silent(), GeneratorPoint.find(run))
        (problem,) = raised.value.problems
        assert problem.startswith(str(run))
        assert "colors has other labelled rows" in problem

    def test_the_base_computes_in_what_it_did_before(self, gen_config, tmp_path, monkeypatch):
        """Here `auto` would choose float32: the run may have come from another machine."""
        settings = {**SMALL, "training.last_every": 1}
        with monkeypatch.context() as patch:
            patch.setattr(precision, "BFLOAT16_FROM", 1)
            patch.setattr(precision, "fast_bfloat16", lambda _: True)
            whole = train(gen_config(settings), Silent()).directory
            with pytest.raises(Kill):
                train(gen_config(settings), StopAt(6))
        (killed,) = set((tmp_path / "experiments").iterdir()) - {whole}
        monkeypatch.undo()
        assert read_manifest(killed, GeneratorManifest).base_dtype == "bfloat16"
        train(gen_config(settings), Silent(), GeneratorPoint.find(killed))
        assert_equal(whole, killed)

    def test_another_length_of_a_phase_is_refused(self, gen_config, trained):
        run = trained().directory
        with pytest.raises(UsageError, match=r"behaviour\.max_steps is 9, the run has 4"):
            train(
                gen_config({**SMALL, "behaviour.max_steps": 9}), Silent(), GeneratorPoint.find(run)
            )
