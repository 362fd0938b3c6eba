"""Wrong captions that a model does not tell from the right ones teach nothing but the images: they are refused."""

import pytest
from helpers.family import Family

from trainer.objectives import TPO, RunContext
from trainer.objectives.preference.perturb import perturb, read_perturbed

LONG = " ".join(f"quality{i}" for i in range(60))


@pytest.fixture
def wrong(tmp_path):
    read_perturbed.cache_clear()
    return lambda text: (tmp_path / "wrong.csv").write_text(f"prompt,perturbed\n{text}\n", "utf-8") and str(tmp_path / "wrong.csv")


def test_captions_that_are_read_alike_are_refused(wrong):
    """At the first step the loss of such a pair is log 2, and its gradient that of the image's error times β."""
    caption = "a picture of nothing, a red star"
    with pytest.raises(ValueError, match=r"the model reads the caption 'a picture of nothing, a red star' \(and 1 more\) and its wrong"):
        TPO().check(RunContext(Family(), prompts=(caption, caption + "!", "a red star")))
    TPO().check(RunContext(Family(), prompts=("a red star",)))
    TPO(captions_file=wrong(f'"{caption}",a picture of a star')).check(RunContext(Family(), prompts=(caption,)))


def test_a_file_without_any_of_the_captions_is_refused(wrong):
    objective = TPO(captions_file=wrong("A red star,a blue star"))
    with pytest.raises(ValueError, match=r"wrong.csv: it has none of the captions, which must be equal to the letter"):
        objective.check(RunContext(Family(), prompts=("a red star",)))
    objective.check(RunContext(Family(), prompts=("A red star", "a red star")))


def test_long_captions_are_changed_near_their_beginning():
    captions = [f"{i} small stars, {LONG}, a large red cat beside a wooden house at night" for i in range(5)]
    assert all((perturb(caption) or "").endswith(caption[-60:]) for caption in captions)
    assert perturb(f"{LONG} a large cat") not in (None, f"{LONG} a large cat")  # no other word can be changed


def test_tokenizers_say_what_is_read_alike(policy):
    long = " ".join(["red"] * 100)
    assert policy.reads_alike("A red star", "a red  star") and policy.reads_alike(f"{long} star", f"{long} ring")
    assert not policy.reads_alike("a red star", "a red ring")
