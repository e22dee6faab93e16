"""benchmarks/encoders.py: a task in other words is found, and words of another task are not."""

import json
import runpy
import sys

import pytest

from tests.conftest import ROOT, write_lines

WORDS = {
    "capital": "Name the capital city of this country",
    "river": "Name the longest river of this country",
    "sum": "Add up both numbers",
}


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Runs the script on three tasks, and on unseen wordings of the tasks that are named."""

    def told(unseen):
        for task, other in zip(WORDS, unseen, strict=True):
            for kind, wording in (("train", WORDS[task]), ("unseen", f"Please: {WORDS[other]}")):
                rows = [{"prompt": f"{wording}: {n}", "response": "a"} for n in range(12)]
                (tmp_path / task).mkdir(exist_ok=True)
                write_lines(tmp_path / task / f"{task}_{kind}_formatted.jsonl", rows)
        families = {"capital": "countries", "river": "countries", "sum": "numbers"}
        text = json.dumps({task: {"family": family} for task, family in families.items()})
        (tmp_path / "tasks.json").write_text(text, encoding="utf-8")
        options = ["--encoder", "hashing dim=256", "--draws", "2", "--prompts", "8"]
        monkeypatch.setattr(sys, "argv", ["encoders.py", str(tmp_path), *options])
        runpy.run_path(str(ROOT / "benchmarks" / "encoders.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out)

    return told


def test_unseen_wordings_lie_nearest_to_their_own_task(told):
    found = told(["capital", "river", "sum"])
    assert (found["own"], found["rank"], found["family"], found["by_chance"]) == (1, 1, 1, 0.5)
    assert (found["tasks"], found["texts"]) == (3, 3 * (3 + 2 * 2))


def test_wordings_of_another_task_do_not(told):
    found = told(["sum", "sum", "capital"])
    assert found["own"] == 0
    assert found["rank"] > 1.5
