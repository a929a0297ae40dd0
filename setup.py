"""Builds mesh/native: plain C on UCX's headers, loaded by ctypes; all else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("mesh/native")


def libucx() -> Path:
    """The folder of UCX's wheel, which has its headers."""
    spec = find_spec("libucx")
    if spec is None or spec.origin is None:
        raise SystemExit("libucx-cu13 is not installed: build with pip, which installs it first")
    return Path(spec.origin).parent


class Build(build_ext):
    """Compiles with the machine's compiler; where it has none, with the one of ``ziglang``."""

    def build_extensions(self) -> None:
        if not shutil.which(self.compiler.compiler[0]):
            zig = [sys.executable, "-m", "ziglang", "cc"]
            self.compiler.set_executables(compiler_so=[*zig, "-fPIC"], linker_so=[*zig, "-shared"])
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        """Nothing in it depends on the version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "mesh.native.libmesh",
            sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fno-math-errno",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
                "-Wno-psabi",
                f"-isystem{libucx() / 'include'}",
            ],
            library_dirs=[str(libucx() / "lib")],
            libraries=["ucp", "ucs"],
        )
    ],
)
