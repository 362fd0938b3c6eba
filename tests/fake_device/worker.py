"""The process in which the tests of this folder run.

PyTorch starts the autograd threads of its devices once, at the first backward pass, so that a device must be known before;
and a device, once known, stays: no other test should see it.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .strict import NAME, install


def start() -> None:
    """Prepare the process: the device is there, also for the commands."""
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # or matrix products round by where a weight lies in memory
    torch.set_num_threads(1)
    if os.environ.get("TEST_DEVICE"):
        return
    install()
    from trainer.runtime import device

    device.KINDS = (*device.KINDS, NAME)


def call(file: str, function: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """Run one test of a file: the traceback where it fails, and the end of what was printed."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            getattr(_module(file), function)(**arguments)
    except Exception:
        return f"{traceback.format_exc()}\n{printed.getvalue()[-5000:]}", ""
    return "", printed.getvalue()[-5000:]


@cache
def _module(file: str) -> ModuleType:
    name = f"fake_device_{file}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
