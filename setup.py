"""Puts configs/, which lies at the top of a checkout, into the package as dalle1/configs/.

Everything else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = sorted(path.as_posix() for path in Path("configs").rglob("*.yaml"))


class BuildWithConfigs(build_py):
    """`build_py` that copies the files of settings; an editable install reads the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path, target in self._targets().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(path, target)

    def get_source_files(self) -> list[str]:  # what an sdist holds
        return [*super().get_source_files(), *CONFIGS]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        targets = [] if self.editable_mode else self._targets().values()
        return [*super().get_outputs(include_bytecode), *targets]

    def _targets(self) -> dict[str, str]:
        return {path: str(Path(self.build_lib, "dalle1", path)) for path in CONFIGS}


setup(cmdclass={"build_py": BuildWithConfigs})
