"""What is generated is current, and what the README promises exists."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@cache
def generator():
    """`docs/generate.py`, which `make docs` runs."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


def test_the_pages_of_commands_and_settings_are_current():
    generate = generator()
    pages = {**generate.cli_pages(), **generate.configuration_pages()}
    for file, text in pages.items():
        assert file.exists() and file.read_text(encoding="utf-8") == text, (
            f"{file}: run `make docs`"
        )
    written = [*(DOCS / "cli").iterdir(), *(DOCS / "configuration").glob("[!i]*")]
    assert sorted(written) == sorted(pages), "a page of what is no more: delete it"


def test_every_command_and_every_setting_has_its_row():
    cli = "".join(file.read_text(encoding="utf-8") for file in (DOCS / "cli").iterdir())
    assert "\n## loragen gen infer\n" in cli
    assert "| `--draws <int range>` |" in cli
    settings = (DOCS / "configuration" / "gen.md").read_text(encoding="utf-8")
    assert "| `behaviour.max_steps` | integer, ≥ 1, ≤ 10,000,000 | `200` |" in settings
    options = (DOCS / "configuration" / "plugins.md").read_text(encoding="utf-8")
    assert "| `pull` | number, ≥ 0, ≤ 1 | `1.0` |" in options


def test_the_table_of_formats_is_that_of_the_declarations():
    written = (DOCS / "collecting.md").read_text(encoding="utf-8")
    assert written == generator().with_formats(written), "run `make docs`"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site in both languages, built as `make docs` builds it."""
    for module in ("material", "latex2mathml"):
        pytest.importorskip(module, reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    for arguments in (["-d", folder], ["-f", "mkdocs.zh.yml", "-d", folder / "zh"]):
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_in_two_languages_and_can_be_searched(site):
    for page, language, words in (
        (site, "en", "Prompts in, LoRA adapters out."),
        (site / "zh", "zh", "输入提示词，输出 LoRA 适配器。"),
    ):
        html = (page / "index.html").read_text(encoding="utf-8")
        assert f'lang="{language}"' in html
        assert words in html
        index = json.loads((page / "search" / "search_index.json").read_text(encoding="utf-8"))
        assert {"cli/gen/#loragen-gen-infer", "equations/"} <= {
            one["location"] for one in index["docs"]
        }
        assert index["config"]["lang"] == ["en"] if language == "en" else ["zh", "en"]


def test_the_site_asks_no_other_server_and_its_formulas_are_mathml(site):
    for file in site.rglob("*.html"):
        loaded = re.findall(
            r"""(?:src|<link[^>]*href)=["']?(?:https?:)?//[^"' >]+""", file.read_text()
        )
        assert not loaded, f"{file}: {loaded}"
    equations = (site / "equations" / "index.html").read_text(encoding="utf-8")
    assert equations.count("<math") == (DOCS / "equations.md").read_text("utf-8").count("```math")


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
    for document in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
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
        text = (DOCS / page).read_text(encoding="utf-8")
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
    written = (DOCS / "plugin-api.md").read_text(encoding="utf-8")
    assert written == generate.api_document(written), (
        "a hook, a protocol or a check has another signature: plugins of others rely on it. If it "
        "has to be, run `make docs`, and name the new revision in CHANGELOG.md"
    )
    revision = re.search(r"^Revision (\d+) of the plugin API\.$", written, re.MULTILINE)[1]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"(revision {revision} of the plugin API)" in changes


def test_another_signature_is_another_revision():
    generate = generator()
    written = (DOCS / "plugin-api.md").read_text(encoding="utf-8")
    revision = int(re.search(r"^Revision (\d+)", written, re.MULTILINE)[1])
    before = written.replace("step: int, total_steps: int", "step: int")
    assert before != written
    assert f"Revision {revision + 1} of" in generate.api_document(before)
