"""What mkdocs.yml cannot say: pages from outside of docs/, their links, the Chinese site, and
formulas as MathML, which needs no script from another server."""

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/commonsense/README.md": "examples/commonsense.md",
    "examples/real-tasks/PROTOCOL.md": "examples/protocol.md",
    "examples/real-tasks/README.md": "examples/real-tasks.md",
}
"""{page in the repository: page of the site}"""
TRANSLATED = ".zh-CN.md"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"][
    "Repository"
]
"""Not `repo_url`, for which the theme's script would ask GitHub on every page."""
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def formula(source: str, *_: Any, **__: Any) -> str:
    """A block of TeX as MathML."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    # Anchors as the page of the same file has them in a repository's web interface.
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside; in the Chinese site, a translation takes its page's place."""
    for place, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    for file in list(files):
        source = Path(str(file.abs_src_path))
        if file.src_uri.endswith(TRANSLATED):
            files.remove(file)
        elif config.theme["language"] == "zh" and (
            (translation := source.with_suffix(TRANSLATED)).exists()
        ):
            files.remove(file)
            files.append(File.generated(config, file.src_uri, abs_src_path=str(translation)))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, **_: Any) -> Navigation:
    """Translates the titles of sections; those of pages are their headings."""

    def translate(items: list[Any]) -> None:
        for item in items:
            if isinstance(item, Section):
                item.title = config.extra.get("titles", {}).get(item.title, item.title)
                translate(item.children)

    translate(nav.items)
    return nav


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links between files of the repository to the pages of the site, or to the repository
    on the web where there is none."""
    if page.file.src_uri == "changelog.md":  # it has every word, and would be the first result
        page.meta["search"] = {"exclude": True}
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT).as_posix()
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / place).exists():  # a URL
            return found[0]
        uri = place.replace(TRANSLATED, ".md")
        uri = OUTSIDE.get(uri, uri.removeprefix("docs/") if uri.startswith("docs/") else "")
        if uri == page.file.src_uri and place != source:  # the other language: see the header
            return ""
        if uri:
            return f"{text}({posixpath.relpath(uri, here or '.')}{anchor})"
        return f"{text}({REPOSITORY}/{'tree' if (ROOT / place).is_dir() else 'blob'}/main/{place})"

    parts = FENCE.split(markdown)
    return "".join(p if i % 2 else LINK.sub(link, p) for i, p in enumerate(parts))
