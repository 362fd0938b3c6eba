"""Every test of this folder runs in one process of its own; see worker.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from fake_device import worker
from fake_device.build import NoCompiler, library


@pytest.fixture(scope="session", autouse=True)
def process() -> Iterator[ProcessPoolExecutor]:
    try:
        library()
    except NoCompiler as reason:
        pytest.skip(str(reason))
    with ProcessPoolExecutor(1, get_context("spawn"), worker.start) as pool:
        yield pool


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    pool = pyfuncitem.funcargs["process"]
    failure = pool.submit(worker.call, str(pyfuncitem.path), pyfuncitem.function.__name__, arguments).result()
    if failure:
        pytest.fail(failure, pytrace=False)
    return True


@pytest.fixture
def family(request: pytest.FixtureRequest, family_folder):
    """The folder of a tiny random model of the family that the test is parametrised with."""
    return family_folder(request.param)
