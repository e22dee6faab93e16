"""What is removed of a run, and what is left alone."""

import pytest

from loragen.core.errors import UsageError
from loragen.core.outputs import with_record
from loragen.core.run.lock import RunLock
from loragen.core.run.removal import plan_removal
from tests.made_runs import make_run

LOGGED = (
    "tensorboard_logs/events.out.tfevents.1.vm.2.0",
    "tensorboard_logs/hparams.yaml",
    "csv_logs/metrics.csv",
    "swanlab_logs/.gitignore",
    "swanlab_logs/run-2026-x/files/config.yaml",
    "wandb_logs/wandb/offline-run-1/run.wandb",
    "mlflow_logs/mlflow.db",
    "trackio_logs/loragen-lora.db",
    "tracking/batch_tracking_arc.jsonl",
    "tracking/line_checkpoint_mapping_arc.json",
    "checkpoints/last.ckpt",
    "final_model/model-00001-of-00002.safetensors",
    "final_model/tokenizer.json",
    "checkpoints/.x.ckpt.abc.unfinished/x.ckpt",
    ".run.lock",
)


def write_adapter(run):
    """As `write_adapter` does, without torch."""
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(bytes(500))
    card = with_record("# arc_lora_1", run / "adapter")
    (run / "adapter" / "README.md").write_text(card)


def below(run):
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "runs", "arc_lora_1", files=LOGGED)
    write_adapter(run)
    (run / "swanlab_logs" / "run-2026-x" / "media").mkdir()  # SwanLab leaves it empty
    return run


def test_all_of_a_run_is_loragens(run):
    plan = plan_removal(run, "lora", True, checkpoints_only=False)
    assert plan.kept == []
    assert plan.size > 2500
    plan.run()
    assert list(run.parent.iterdir()) == []


def test_what_others_have_put_there_stays(run):
    mine = [
        "notes.txt",
        "checkpoints/checkpoint-step-007.ckpt.bak",
        "checkpoints/my-step-007.ckpt",
        "checkpoints/checkpoint-step-7.ckpt",
        "tensorboard_logs/screenshot.png",
        "wandb_logs/mine.txt",
        "final_model/mine.bin",
        "adapter/mine.bin",
        "results/final_model/mine.pt",
    ]
    for file in mine:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("mine")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"trained on by another program")
    (run / "plots").mkdir()
    plan = plan_removal(run, "lora", True, checkpoints_only=False)
    kept = sorted([*mine, "adapter/adapter_model.safetensors"])
    assert [path.relative_to(run).as_posix() for path in plan.kept] == kept
    plan.run()
    assert below(run) == kept
    assert (run / "plots").is_dir()
    assert not (run / "swanlab_logs").exists()


def test_an_adapter_without_a_record_is_not_loragens(run):
    (run / "adapter" / "README.md").write_text("# another")
    plan_removal(run, "lora", True, checkpoints_only=False).run()
    assert [path for path in below(run) if not path.startswith("adapter/")] == []
    assert len(below(run)) == 3


def test_links_are_not_followed(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "checkpoint-step-009.ckpt").write_bytes(bytes(9))
    (run / "results").symlink_to(elsewhere)
    (run / "checkpoints" / "checkpoint-step-010.ckpt").symlink_to(elsewhere / "x")
    (run / "wandb_logs" / "wandb" / "latest-run").symlink_to("offline-run-1")
    plan = plan_removal(run, "lora", True, checkpoints_only=False)
    assert plan.kept == [run / "results"]
    plan.run()
    assert [path.name for path in run.iterdir()] == ["results"]
    assert (elsewhere / "checkpoint-step-009.ckpt").exists()
    other = run.with_name("link")
    other.symlink_to(run)
    with pytest.raises(UsageError, match="link is a link; name the run itself"):
        plan_removal(other, "lora", True, checkpoints_only=False)


def test_checkpoints_alone_leave_the_last_and_all_else(run):
    before = below(run)
    plan = plan_removal(run, "lora", True, checkpoints_only=True)
    assert plan.kept == []
    plan.run()
    gone = {"checkpoints/checkpoint-step-007.ckpt", "checkpoints/last.ckpt"}
    assert set(before) - set(below(run)) == gone


def test_an_unfinished_run_keeps_what_it_resumes_from(run):
    plan_removal(run, "lora", False, checkpoints_only=True).run()
    names = {path.name for path in (run / "checkpoints").iterdir() if path.is_file()}
    assert names == {"last.ckpt", "checkpoint-step-008.ckpt"}


def test_the_checkpoints_of_a_generator_go_once_it_has_its_file(tmp_path):
    files = ["checkpoints/last.ckpt", "checkpoints/epoch=1-val_loss=0.5.ckpt"]
    run = make_run(tmp_path, "gen_1", kind="generator", files=files)
    for finished in (False, True):  # without its file
        assert plan_removal(run, "generator", finished, checkpoints_only=True).files == []
    (run / "results" / "final_model").mkdir(parents=True)
    for name in ("generator_model.pt", "generator_model.collected.safetensors"):
        (run / "results" / "final_model" / name).write_bytes(bytes(100))
    plan_removal(run, "generator", True, checkpoints_only=True).run()
    assert list((run / "checkpoints").iterdir()) == []
    plan_removal(run, "generator", True, checkpoints_only=False).run()
    assert not run.exists()


def test_a_run_that_is_written_is_refused(run):
    before = below(run)
    plan = plan_removal(run, "lora", True, checkpoints_only=False)
    lock = RunLock(run).acquire()
    with pytest.raises(UsageError, match="is being written by process"):
        plan.run()
    lock.release()
    assert below(run) == before
