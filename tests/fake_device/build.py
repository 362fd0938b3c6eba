"""Compile backend.cpp for the PyTorch that is installed, once: the library is kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("backend.cpp")


class NoCompiler(RuntimeError):
    """The device cannot be built on this machine."""


def compiler() -> str:
    """The machine's C++ compiler."""
    if sys.platform == "win32":
        raise NoCompiler("the fake device is built on Linux and macOS only")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise NoCompiler("the fake device needs a C++ compiler (c++, g++, clang++ or $CXX): none was found")


def command(cxx: str, library: Path) -> list[str]:
    """One compiler call: no ninja, no setuptools."""
    from torch.utils import cpp_extension

    newer = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    flags = ["-shared", "-fPIC", "-O1", "-w", "-std=c++20" if newer else "-std=c++17"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    found = [f"-I{path}" for path in cpp_extension.include_paths()]
    links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    return [cxx, *flags, *found, str(SOURCE), *links, "-o", str(library)]


def library() -> Path:
    """The compiled backend; raises NoCompiler where there is no way to make it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagerefl-tests"
    key = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes() + f"{torch.__version__} {sys.platform}".encode())
    path = cache / f"fake-device-{key.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    cxx = compiler()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            partial = path.with_suffix(".partial")
            done = subprocess.run(command(cxx, partial), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{cxx} could not compile {SOURCE.name} for torch {torch.__version__}:\n{done.stderr[-3000:]}")
            os.replace(partial, path)
    return path
