"""Builds the C++ runtime with CMake: setuptools calls `CMakeBuild` (pyproject.toml), and so a wheel, or an editable
installation's `kernels/lib/`, gets the library and its programs, `pocketforge-run` and `pocketforge-check`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent


class CMakeBuild(build_ext):
    """`build_ext` for the one extension `kernels.lib`, which is no Python module but a library and two programs."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        build_runtime(ROOT / "build" / f"runtime-{platform.machine()}", ROOT if in_place else Path(self.build_lib).resolve())

    def get_outputs(self) -> list[str]:
        names = ("libpocketforge.so", "pocketforge-run", "pocketforge-check", "pocketforge-replay")
        return [str(Path(self.build_lib) / "kernels" / "lib" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable installation has its files in the source tree already


def build_runtime(build: Path, install: Path, *arguments: str) -> None:
    """Configure, build and install under `install`/kernels/lib. Raises SystemExit with what is missing, or what failed."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("error: no cmake; `pip install cmake ninja`, or install your system's package")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit("error: no C++17 compiler (c++, g++ or clang++); install one, or name it in CXX")
    # An isolated build finds ninja at a new place every time, so the cached one must give way.
    ninja = shutil.which("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    _run([cmake, "-S", str(ROOT / "kernels" / "cpu"), "-B", str(build), *generator, "-DCMAKE_BUILD_TYPE=Release", *arguments])
    _run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
    _run([cmake, "--install", str(build), "--prefix", str(install)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nerror: {' '.join(command)} failed with status {done.returncode}")
