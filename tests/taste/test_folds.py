"""Folds share no image, and where possible no prompt."""

from __future__ import annotations

import pytest

from trainer.taste.folds import Keys, folds


@pytest.mark.parametrize(
    ("keys", "level"),
    [
        ([Keys(f"p{i // 3}", (f"{i}a", f"{i}b")) for i in range(60)], "prompt and image"),
        ([Keys("one prompt", (i // 2, f"{i}b")) for i in range(40)], "image"),
        ([Keys("one prompt", (i % 7, 10 + i % 5)) for i in range(30)], "pair"),
    ],
)
def test_no_image_and_where_possible_no_prompt_is_on_both_sides_of_a_fold(keys, level):
    found = folds(keys)
    assert found.level == level
    assert sorted(i for _, test in found.parts for i in test.tolist()) == list(range(len(keys)))
    for train, test in found.parts:
        images = [{image for i in rows.tolist() for image in keys[i].images} for rows in (train, test)]
        prompts = [{keys[i].prompt for i in rows.tolist()} for rows in (train, test)]
        assert not images[0] & images[1]
        assert level != "prompt and image" or not prompts[0] & prompts[1]
    assert [t.tolist() for _, t in folds(keys).parts] == [t.tolist() for _, t in found.parts]
