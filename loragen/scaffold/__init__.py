"""Writes a package with a plugin in it: `loragen plugins new`.

`templates/` holds one set of files for every kind of plugin, and of each kind a class with its
test. A class is a working example that keeps the contract of its kind, to be replaced by its
author's.
"""

import keyword
import re
from importlib.resources import files
from pathlib import Path
from shlex import quote

from loragen.core.errors import UsageError
from loragen.core.outputs import check_writable, refuse_file, written_directory
from loragen.core.plugins import check_kind, describe, names

LIBRARIES = {
    "logger": ("lightning", "pydantic"),
    "encoder": ("pydantic", "torch"),
    "decoder": ("pydantic", "torch"),
    "schedule": ("pydantic",),
    "objective": ("pydantic", "torch"),
}
"""What the class of a kind imports beside loragen, which depends on all of it."""
CHOOSE = {
    "logger": "lora train --dataset FILE --set 'loggers.{}={{}}'",
    "encoder": "gen train --checkpoint-dir runs --set encoder.name={}",
    "decoder": "gen train --checkpoint-dir runs --set decoder.name={}",
    "schedule": "lora train --dataset FILE --set schedule.name={}",
    "objective": "gen train --checkpoint-dir runs --set training.objective={}",
}
"""The command that uses a plugin of a kind."""


class Scaffold:
    """The package of one plugin. Nothing is written before `write`."""

    def __init__(self, name: str, kind: str) -> None:
        """Raises UsageError if the kind is unknown, if the name cannot be that of a package and a
        class, and if a plugin of this name is installed."""
        check_kind(kind)
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 60:
            raise UsageError(
                f"'{name}' cannot be the name of a plugin: it begins with a letter, has lower-case "
                "letters, digits and single hyphens, and at most 60 characters"
            )
        if name in names(kind):
            raise UsageError(
                f"{kind} '{name}' is installed already, by {describe(kind, name).origin}; "
                "choose another name"
            )
        self.name, self.kind = name, kind
        self.package = f"loragen-{name.removeprefix('loragen-')}"
        self.module = self.package.replace("-", "_")
        self.class_name = "".join(word.capitalize() for word in name.split("-"))
        taken = re.search(rf"\b{self.class_name}\b", _template(f"{kind}.py"))
        if taken or keyword.iskeyword(self.class_name):
            self.class_name += kind.capitalize()

    @property
    def documents(self) -> dict[str, str]:
        """{path below the directory of the package: text}"""
        from jinja2 import Environment, StrictUndefined

        from loragen import __version__

        environment = Environment(
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            trim_blocks=True,
            autoescape=False,  # Python, TOML and Markdown, not HTML
        )
        values = {
            **vars(self),
            "dependencies": [f"loragen>={__version__}", *LIBRARIES[self.kind]],
            "commands": self.commands(Path(self.package)),
            "use": self.use,
        }
        places = {
            "pyproject.toml": "pyproject.toml",
            "README.md": "README.md",
            "tests.yml": ".github/workflows/tests.yml",
            "__init__.py": f"src/{self.module}/__init__.py",
            f"{self.kind}.py": f"src/{self.module}/{self.kind}.py",
            f"test_{self.kind}.py": f"tests/test_{self.kind}.py",
        }
        texts = {
            place: environment.from_string(_template(source)).render(values)
            for source, place in places.items()
        }
        return {**texts, f"src/{self.module}/py.typed": ""}

    @property
    def use(self) -> str:
        """The arguments of `loragen` that use the plugin."""
        return CHOOSE[self.kind].format(self.name)

    def commands(self, directory: Path) -> list[str]:
        """Returns what its author does next."""
        return [
            f"cd {quote(str(directory))}",
            'pip install -e ".[dev]"',
            "pytest",
            f"loragen plugins show {self.kind} {self.name}",
            f"loragen {self.use}",
        ]

    def write(self, directory: Path) -> list[str]:
        """Writes the package and returns the paths of its files below the directory.

        Raises UsageError if the directory holds anything: files there are their author's by now.
        """
        refuse_file(directory)
        check_writable(directory)
        if directory.is_dir() and any(directory.iterdir()):
            raise UsageError(
                f"{directory} exists and is not empty; choose another directory by --output"
            )
        documents = self.documents
        with written_directory(directory, lambda _: None) as new:
            for place, text in documents.items():
                (new / place).parent.mkdir(parents=True, exist_ok=True)
                (new / place).write_text(text, encoding="utf-8", newline="\n")
        return list(documents)


def _template(name: str) -> str:
    template = files("loragen.scaffold").joinpath("templates", f"{name}.jinja")
    return template.read_text(encoding="utf-8")
