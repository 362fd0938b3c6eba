"""Every test of this folder runs in one process of its own; see worker.py."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from fake_device import worker
from fake_device.build import NoCompiler, library

REAL = os.environ.get("TEST_DEVICE", "")  # a card in place of the fake device: TEST_DEVICE=cuda:0


@pytest.fixture(scope="session", autouse=True)
def process() -> Iterator[ProcessPoolExecutor]:
    try:
        REAL or library()
    except NoCompiler as reason:
        pytest.skip(str(reason))
    with ProcessPoolExecutor(1, get_context("spawn"), worker.start) as pool:
        yield pool


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    if REAL and pyfuncitem.path.name in ("test_strict.py", "test_transfers.py"):
        pytest.skip("of the fake device itself")
    if REAL and pyfuncitem.funcargs.get("mode") == "cuda":
        pytest.skip("both modes are one on a card")
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    pool = pyfuncitem.funcargs["process"]
    failure, printed = pool.submit(worker.call, str(pyfuncitem.path), pyfuncitem.function.__name__, arguments).result()
    print(printed)
    if failure:
        pytest.fail(failure, pytrace=False)
    return True


@pytest.fixture
def family(request: pytest.FixtureRequest, family_folder):
    """The folder of a tiny random model of the family that the test is parametrised with."""
    return family_folder(request.param)
