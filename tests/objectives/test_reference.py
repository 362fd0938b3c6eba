"""A reference that follows the tuned model, for every objective that has one."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.family import Family, gradient
from helpers.preference import PROMPTS, Captioned, by_dpo, by_kto, images, labels, pairs, written_up

from trainer.config import ConfigError, build
from trainer.objectives import OBJECTIVES, DiffusionDPO, DiffusionKTO, MaPO, RunContext
from trainer.objectives.preference.errors import DenoisingObjective

REFERRING = {name: cls for name, cls in OBJECTIVES.items() if issubclass(cls, DenoisingObjective) and cls.may_follow and name != "smpo"}
DATA = {"pairs": pairs, "labels": labels, "images": images}


def at(batch, step):
    return dataclasses.replace(batch, rng=dataclasses.replace(batch.rng, step=step))


def trained(loss, policy, batch, steps, first=0):
    """The losses of plain gradient steps, and the parameters before each."""
    seen = []
    for step in range(first, first + steps):
        value = loss(at(batch, step))[0]
        seen.append((value.detach(), policy.weight.detach().clone()))
        found = gradient(policy, value)
        policy.weight.data -= 0.05 * found / found.norm()
    return seen


def expected_reference(weights, every, decay):
    """v at each step, from the parameters before each."""
    value, found = weights[0], []
    for step, weight in enumerate(weights):
        value = decay * value + (1 - decay) * weight if step % every == 0 else value
        found.append(value)
    return found


@pytest.mark.parametrize(("every", "decay"), [(2, 0.0), (1, 0.75), (3, 0.5)])
@pytest.mark.parametrize("name", ["diffusion-dpo", "diffusion-kto"])
def test_the_loss_is_the_one_by_hand_with_the_parameters_that_follow(name, every, decay):
    policy = Captioned()
    settings = {"beta": 20.0, "reference_every": every, "reference_decay": decay}
    objective = DiffusionDPO(safeguard=False, **settings) if name == "diffusion-dpo" else DiffusionKTO(**settings)
    batch = pairs() if name == "diffusion-dpo" else labels()
    seen = trained(objective.begin(RunContext(policy, prompts=PROMPTS)), policy, batch, 6)
    references = expected_reference([weight for _, weight in seen], every, decay)
    assert len({tuple(v.tolist()) for v in references}) == {1: 6, 2: 3, 3: 2}[every]
    for step, ((value, weight), reference) in enumerate(zip(seen, references, strict=True)):
        here = at(batch, step)
        if name == "diffusion-dpo":
            both = [[written_up(policy, here, x, PROMPTS, w)[0] for w in (weight, reference)] for x in (batch.chosen, batch.rejected)]
            hand = by_dpo(policy, objective, *both).mean()
        else:
            ours, theirs = (written_up(policy, here, batch.latents, PROMPTS, w)[0] for w in (weight, reference))
            hand = by_kto(theirs - ours, (batch.labels > 0).tolist(), 20.0).mean()
        assert float(value) == pytest.approx(float(hand), rel=1e-9), step


@pytest.mark.parametrize("name", REFERRING)
def test_a_resumed_run_has_the_same_reference_to_the_bit(name):
    settings = {"reference_every": 2, "reference_decay": 0.25} | ({"rollout_steps": 3} if name == "dro" else {})
    objective = REFERRING[name](**settings)
    kind = Family if name in ("inpo", "dro") else Captioned  # whose denoisers of some rows are asked
    batch = DATA[objective.data.__name__.lower()]()
    policy = kind()
    loss = objective.begin(RunContext(policy, prompts=PROMPTS))
    trained(loss, policy, batch, 3)
    state = loss.state()
    again = kind()
    again.weight.data = policy.weight.detach().clone()
    whole = trained(loss, policy, batch, 4, first=3)
    resumed = objective.begin(RunContext(again, prompts=PROMPTS))
    resumed.restore(state)
    assert [(float(v), w.tolist()) for v, w in trained(resumed, again, batch, 4, first=3)] == [(float(v), w.tolist()) for v, w in whole]
    plain = REFERRING[name](**{key: value for key, value in settings.items() if key == "rollout_steps"})
    moved = kind()
    moved.weight.data = whole[-1][1].clone()
    fixed = plain.begin(RunContext(moved, prompts=PROMPTS))(at(batch, 6))[0].detach()
    assert abs(float(fixed) - float(whole[-1][0])) > 1e-6 * abs(float(fixed))  # not the base model's


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (MaPO, {"reference_every": 5}, "reference_every: this objective has no reference that can follow"),
        (DiffusionDPO, {"reference_decay": 0.5}, "reference_decay is of a reference that follows: give reference_every"),
        (
            DiffusionDPO,
            {"reference_every": 1},
            "reference_every = 1 with reference_decay = 0: the reference would be the tuned model itself",
        ),
    ],
)
def test_what_would_be_no_reference_is_refused(cls, settings, said):
    with pytest.raises(ConfigError, match=said):
        build(cls, settings, "objective.")
