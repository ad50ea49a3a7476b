"""Builds the package with its kernels and its lock; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

FOLDER = Path(__file__).parent / "image_classifier" / "kernels"
LOCK = Path(__file__).parent / "requirements" / "requirements-prod.txt"
sys.path.insert(0, str(FOLDER))

import builder  # noqa: E402  # without importing the package


class BuildStep(Command):
    """A step that adds files to the package that is built."""

    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildKernels(BuildStep):
    """Build the kernels into the package that is built, or beside their sources for an editable install."""

    description = "build the kernels"

    def _get_folder(self) -> Path:
        assert self.build_lib is not None
        return FOLDER if self.editable_mode else Path(self.build_lib) / "image_classifier" / "kernels"

    def run(self) -> None:
        builder.build_libraries(self._get_folder(), builder.get_target())

    def get_outputs(self) -> list[str]:
        names = [*builder.get_library_names(builder.get_target()).values(), builder.LIBRARIES]
        return [str(self._get_folder() / name) for name in names]


class BuildLock(BuildStep):
    """Copy the lock of what training runs on into the package, where a run that it trains finds the hashes."""

    description = "copy the lock"

    def run(self) -> None:
        if not self.editable_mode:  # a clone has it beside the package
            self.copy_file(str(LOCK), self.get_outputs()[0])

    def get_source_files(self) -> list[str]:
        return [str(LOCK.relative_to(LOCK.parents[1]))]

    def get_outputs(self) -> list[str]:
        assert self.build_lib is not None
        return [] if self.editable_mode else [str(Path(self.build_lib) / "image_classifier" / LOCK.name)]


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None), ("build_lock", None)]


class Distribution(setuptools.Distribution):
    """A package with libraries of one platform, where there are kernels."""

    def has_ext_modules(self) -> bool:
        return builder.get_target() in builder.TARGETS


class Wheel(bdist_wheel):
    """A wheel for every Python, of one platform where there are kernels."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return super().get_tag()
        system, _, machine = builder.get_target().partition("-")
        platform = {"linux": f"manylinux_2_17_{machine}", "macosx": f"macosx_12_0_{machine}"}[system]
        return "py3", "none", platform


setup(
    distclass=Distribution,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "build_lock": BuildLock, "bdist_wheel": Wheel},
)
