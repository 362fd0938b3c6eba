"""Captioned images in a folder."""

from __future__ import annotations

import pytest
from helpers.images import write_image


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.png", i, f"caption {i}")
    return tmp_path / "images"
