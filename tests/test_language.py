"""The field's words, in names and in sentences: what was renamed does not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# what not to write: why, or what to write instead
AVOID = {
    r"\bDraws\b|\.draws\b|\bdraws\.py": "Rng, rng",
    r"\bTally\b|\bgoing_back\b|\bduring\(": "MemoryTracker, on_backward, phase",
    r"\bParking\b|\b[Pp]arked\b|\bparking\b|\bpark\b|\bunpark": "CPU offloading: to_cpu, on_device",
    r"\boutline\(|\boutline\.py|\b_?outlined\b": "meta_policy",
    r"\bCounted\(": "CountingPolicy",
    r"\bCloud\b|\bcloud\.py": "FeatureStatistics, streaming.py",
    r"\bSurroundings\b|\baround(\.|:)\w": "RunContext, context",
    r"\bStandardised\.raw\b|\bPart\b": "RewardSpec; a chunk of prompts is a PromptChunk",
    r"\bLaw\b|\blaws?\b": "sampling distribution, Gaussian",
    r"\broll\(|\bdef roll\b": "a prefix rollout: trajectory",
    r"\bTwoTower\.words\b|\.words\.": "text_tower",
    r"\bOwn\b(?=[\(\[,)])": "PythonReward",
    r"\b_(Watched|Stand|Sketch)\b|\bUnknown\(": "_TrackedPolicy, _SkippedCall, _StubPolicy, UntrackedReward",
    r"\b[Ww]atch(er)?\.look\b|\b[Aa] look\b|\b(its|between|the|of) looks\b|'s looks\b": "an evaluation",
    r"\bis_lack\b|\bmemory\.place\b": "is_out_of_memory, failing_stage",
    r"\bVersions\b|\.show\(tuned": "WeightSwap.activate",
    r"\btogether\(|\bat_once\b": "batch_size_for",
    r"\bkind: type\b": "cls",
    r"\b(told(?! apart)|odd)\b": "the thing's name",
    r"\bslice_decoder\b|\bslices_decoder\b|\bcheckpoint_(denoiser|decoder|reward|gradients)\b": "vae_slicing, gradient_checkpointing_*",
    r"\bguidance\b\s*(=|:\s*float)": "guidance_scale",
    r"\bpictures?\b": "image",
    r"\bnormalise\s*=|\.normalise\b": "standardise",
    r"\bis no [a-z]": "is not a …",
    r"\b(reward|model|network|objective|weights?) \w+ is told\b|\bis told of\b": "conditioning",
}
OLD_KEYS = {"slice_decoder", "checkpoint_denoiser", "checkpoint_decoder", "checkpoint_reward"}  # of 0.1.0; they stay valid
# file: what of the above stands in it for a reason
ALLOWED = {
    "README.md": {"picture"},  # the HTML element
    "trainer/data/samples.py": {"picture"},  # in the keys of caches that 0.1.0 filled
    "trainer/config.py": OLD_KEYS,
    "docs/upgrade.md": {*OLD_KEYS, "Draws"},
    "docs/nodes.md": {"checkpoint_denoiser"},  # an input of a node keeps its id
}
FILES = [
    path
    for pattern in ("trainer/**/*.py", "nodes/**/*.py", "docs/**/*.md", "web/docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    for path in sorted(ROOT.glob(pattern))
    if "weights" not in path.parts
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_the_fields(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group(0)!r}: write {instead}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for pattern, instead in AVOID.items()
        for match in re.finditer(pattern, line)
        if match.group(0) not in allowed
    ]
    assert not found, "\n".join(found)
