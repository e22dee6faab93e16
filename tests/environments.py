"""Virtual environments that also see the packages of the running one."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class Environment:
    """What is installed in it comes before the packages of the running one."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False)
        scheme = {"base": str(path), "platbase": str(path)}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
        self.python = self.scripts / "python"
        ours = sysconfig.get_path("purelib")
        # addsitedir, not the bare path: loragen itself may be there as an editable install's .pth.
        line = f"import site; site.addsitedir({ours!r})\n"
        (self.site / "beside.pth").write_text(line, encoding="utf-8")

    def install(self, *arguments: str) -> None:
        """`pip install --no-deps ARGUMENTS`"""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        subprocess.run(
            [*pip, "--quiet", "--no-deps", *arguments],
            check=True,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [self.python, *arguments], capture_output=True, text=True, check=False, cwd=self.site
        )
        assert result.returncode == 0 or not check, result.stdout + result.stderr
        return result
