"""Prompts longer than a text encoder reads are named once: by rewards, and by the model in training and sampling."""

from __future__ import annotations

import logging

import pytest
import torch

from trainer.demo import experiment, files
from trainer.rewards.image_reward import TOKENS, word_pieces
from trainer.text import CutReport

LONG = "a red star " * 30


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, "trainer")


def said(caplog):
    return [r.getMessage() for r in caplog.records if "does not read the last" in r.getMessage()]


def test_a_reward_names_a_prompt_that_it_cuts_and_the_number_of_tokens(caplog):
    tower = files.load_tower("proxy")
    kept = tower.tokenize.encoder.context_length - 2
    whole = tower.tokenize.encoder.encode(LONG)
    tower.remember(["a red star"])
    assert said(caplog) == [] and tower.cut("a red star") == 0 and len(whole) > kept
    tower.remember([LONG, "a blue ring on black, " * 30, "a blue ring"])
    wanted = f"the reward's text tower does not read the last {len(whole) - kept} tokens of '{LONG[:80]}…'; nor all of 1 other prompts"
    assert said(caplog) == [wanted]
    tower.remember([LONG + "again"])
    assert len(said(caplog)) == 1
    exact = next(n for n in range(1, 200) if len(tower.tokenize.encoder.encode("star " * n)) >= kept)
    assert tower.cut("star " * exact) == len(tower.tokenize.encoder.encode("star " * exact)) - kept


def test_a_model_names_a_prompt_that_it_cuts_and_what_is_named_is_not_read(caplog):
    policy = experiment.load_base()
    policy.prompts.prepare(["a red star"])
    assert said(caplog) == []
    policy.prompts.prepare([LONG])
    policy.prompts.prepare([LONG + "more"])
    (line,) = said(caplog)
    tokens = int(line.split("last ")[1].split()[0])
    read = policy.pipeline.tokenizer(LONG, verbose=False).input_ids
    assert line.startswith("the model does not read") and tokens == len(read) - 77 > 0
    one, two = (policy.prompts.conditioning([prompt])["encoder_hidden_states"] for prompt in (LONG, LONG + "more"))
    assert torch.equal(one, two)


def test_image_reward_names_what_is_beyond_its_35_tokens(caplog, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star"]) + "\n")
    tokenize = word_pieces(tmp_path / "vocab.txt")
    tokenize(["a red star"])
    assert said(caplog) == []
    ids, _ = tokenize([LONG])
    assert ids.shape == (1, TOKENS) and f"the last {90 - (TOKENS - 2)} tokens" in said(caplog)[0]


def test_prompts_without_an_end_that_is_cut_are_not_reported(caplog):
    CutReport("x")({"a": 0, "b": -3})
    assert said(caplog) == []
