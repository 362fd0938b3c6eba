"""Whatever a reward's own files hold and are called: they are read, or refused in one line that names the file."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.rewards.registry import WeightFolders, load
from trainer.rewards.weighted import parse_weights

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL = settings(QUICK, max_examples=500)
SIZES = [pytest.param(QUICK, id="quick"), pytest.param(FULL, id="full", marks=pytest.mark.full)]

_NUMBERS = st.one_of(st.floats(), st.integers(), st.integers(10**308, 10**320), st.booleans(), st.none(), st.text(max_size=5))
_JSON = st.recursive(
    _NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)
_CONTENT = st.one_of(
    st.fixed_dictionaries({"mean": st.floats(-5, 5), "std": st.floats(0, 5)}).map(lambda v: json.dumps(v).encode("utf-8-sig")),
    st.binary(max_size=40),
    st.fixed_dictionaries({}, optional={"mean": _NUMBERS, "std": _NUMBERS, "images": _JSON}).map(lambda v: json.dumps(v).encode()),
    _JSON.map(lambda v: json.dumps(v).encode("utf-16")),
    st.integers(2, 200_000).map(lambda n: b"[" * n),
)


@pytest.mark.parametrize("size", SIZES)
def test_statistics_are_two_finite_numbers_or_refused(size, tmp_path):
    path, read = tmp_path / "own.statistics.json", 0

    @size
    @given(_CONTENT)
    def check(content):
        nonlocal read
        path.write_bytes(content)
        try:
            mean, std = WeightFolders().read_statistics(str(tmp_path / "own.py"))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            held = json.loads(content.decode("utf-8-sig"))
            assert (mean, std) == (float(held["mean"]), float(held["std"])) and math.isfinite(mean) and 0 < std < math.inf
            read += 1

    check()
    assert read > 0


_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=20)
_SOURCES = st.one_of(
    st.just("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n").map(str.encode),
    st.binary(max_size=60),
    st.sampled_from(["reward = 1", "import no_such_module", "raise SystemExit(3)", "raise KeyboardInterrupt", "(" * 300, "\ufeffx"]).map(
        str.encode
    ),
)


@pytest.mark.parametrize("size", SIZES)
def test_reward_files_of_any_name_and_content(size, tmp_path):
    modules, path_hooks, opened = set(sys.modules), list(sys.meta_path), 0

    @size
    @given(_NAMES, _SOURCES)
    def check(name, source):
        nonlocal opened
        path = os.path.join(tmp_path, name + ".py")
        try:
            with open(path, "wb") as file:
                file.write(source)
        except (OSError, UnicodeError):  # the file system's own limits
            return
        try:
            reward = load(path).reward
        except ValueError as error:
            assert path in str(error) and "\n" not in str(error).replace(path, ""), error
        except KeyboardInterrupt:
            assert source == b"raise KeyboardInterrupt"
        else:
            assert reward(torch.full((2, 3, 4, 4), 0.5), ["", ""]).tolist() == [0.5, 0.5]
            assert parse_weights(path) == [(path, 1.0)] and parse_weights(f"{path}=2") == [(path, 2.0)]
            opened += 1
        finally:
            os.unlink(path)

    check()
    assert opened > 5 and sys.meta_path == path_hooks
    assert {name for name in sys.modules if name not in modules and not name.startswith("own_reward_")} <= {"encodings.undefined"}
