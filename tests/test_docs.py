"""What is generated is current, and what the README promises exists."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def generator():
    """`docs/generate.py`, which `make docs` runs."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


def test_the_table_of_formats_is_that_of_the_declarations():
    written = (ROOT / "docs" / "collecting.md").read_text(encoding="utf-8")
    assert written == generator().with_formats(written), "run `make docs`"


def test_the_command_reference_is_current():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator().cli_document(), "run `make docs`"


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


def test_the_extra_that_the_hub_and_parquet_need_is_named_where_they_are():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert 'pip install -e ".[offline,data]"' in text
        (line,) = [line for line in text.splitlines() if "`.parquet`" in line]
        assert "`data`" in line


def test_the_pages_for_contributors_name_what_exists():
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "loragen").rglob("*.py")]
    names = set(re.findall(r"\w+", "\n".join(sources)))
    for page in ("architecture.md", "training-step.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for path in re.findall(r"`([\w/]+\.py)`", text):
            places = [folder / path for folder in (ROOT, ROOT / "loragen", *_rooms())]
            assert any(place.is_file() for place in places), f"{page}: {path}"
        for name in re.findall(r"`([\w.]*(?:[a-z]_|[a-z][A-Z])\w*)(?:\([^`]*\))?`", text):
            assert set(name.split(".")) <= names, f"{page}: {name}"


def _rooms() -> list[Path]:
    """A table's cell names a second file of a room by its last part alone."""
    return [file.parent for file in (ROOT / "loragen" / "core").glob("*/__init__.py")]


def test_the_plugin_api_is_pinned_and_its_revision_is_in_the_changelog():
    generate = generator()
    written = (ROOT / "docs" / "plugin-api.md").read_text(encoding="utf-8")
    assert written == generate.api_document(written), (
        "a hook, a protocol or a check has another signature: plugins of others rely on it. If it "
        "has to be, run `make docs`, and name the new revision in CHANGELOG.md"
    )
    revision = re.search(r"^Revision (\d+) of the plugin API\.$", written, re.MULTILINE)[1]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"(revision {revision} of the plugin API)" in changes


def test_another_signature_is_another_revision():
    generate = generator()
    written = (ROOT / "docs" / "plugin-api.md").read_text(encoding="utf-8")
    revision = int(re.search(r"^Revision (\d+)", written, re.MULTILINE)[1])
    before = written.replace("step: int, total_steps: int", "step: int")
    assert before != written
    assert f"Revision {revision + 1} of" in generate.api_document(before)
