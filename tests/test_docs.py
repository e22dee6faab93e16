"""What is generated is current, and what the README promises exists."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_command_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generate.cli_document(), "run `make docs`"


def test_both_readmes_show_the_two_commands_and_the_same_table():
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    for text in (english, chinese):
        assert "make demo" in text
        assert "make test" in text
    numbers = [re.findall(r"\b0\.\d\d\b", text) for text in (english, chinese)]
    assert numbers[0] == numbers[1]
    assert numbers[0], "the README shows the table that the demo printed"


def test_every_link_to_a_file_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
