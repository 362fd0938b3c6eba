"""What tables of pairs and labels say of images beside prompt and label: captions, masks, least noise levels."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.family import Family
from helpers.images import SQUARE, Encoder
from PIL import Image

from trainer.config import ConfigError, build
from trainer.data.batches import Details, Images
from trainer.data.preferences import read_pairs
from trainer.data.report import Report
from trainer.data.samples import load_samples
from trainer.objectives import OBJECTIVES
from trainer.training.config import TrainConfig
from trainer.training.parts import Parts, check_settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Images of 8×8 pixels; masks whose left half counts, of the right size and another, and a black one."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        Image.effect_noise((8, 8), 20 + i).convert("RGB").save(tmp_path / f"{i}.png")
    left = Image.new("L", (8, 8))
    left.paste(255, (0, 0, 4, 8))
    left.save("left.png")
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (16, 8), 255).save("wide.png")
    return tmp_path


def samples(text, labels=False):
    name = "labels.csv" if labels else "pairs.csv"
    with open(name, "w") as file:
        file.write(text)
    return load_samples(Encoder(), "", "", SQUARE, **{"labels" if labels else "pairs": name})


def details_by_prompt(found):
    batch = found.batch(0, 0, 0, len(found.prompts))
    return batch.prompts, batch.details


def test_captions_masks_and_levels_of_pairs_come_with_their_rows(here):
    found = samples(
        "chosen,rejected,prompt,chosen_caption,rejected_caption,chosen_mask,mask,least_noise,rejected_least_noise\n"
        "0.png,1.png,p,one,two,left.png,,0.5,0.75\n"
        "2.png,3.png,q,,,,left.png,,\n"
    )
    prompts, details = details_by_prompt(found)
    p, q = prompts.index("p"), prompts.index("q")
    assert [(c[p], c[q]) for c in details.captions] == [("one", "q"), ("two", "q")] and details.least[[p, q]].tolist() == [0.75, 0.0]
    half = torch.cat([torch.full((1, 4, 2), 2.0), torch.zeros(1, 4, 2)], 2)  # the mean is 1
    for i, (of_p, of_q) in enumerate([(half, half), (torch.ones(1, 4, 4), half)]):
        torch.testing.assert_close(details.masks[i][p], of_p)
        torch.testing.assert_close(details.masks[i][q], of_q)
    assert set(found.texts) == {"p", "q", "one", "two"}
    plain = samples("chosen,rejected,prompt\n0.png,1.png,p\n2.png,3.png,q\n")
    assert details_by_prompt(plain)[1] == Details() and "details" in found.fingerprint and "details" not in plain.fingerprint
    turned = samples("image_0,image_1,label_0,caption,caption_0,caption_1,least_noise_0\n0.png,1.png,0,p,zero,one,0.25\n")
    assert details_by_prompt(turned)[1].captions == (("one",), ("zero",)) and details_by_prompt(turned)[1].least.tolist() == [0.25]


def test_a_mask_with_other_content_is_other_data(here):
    text = "chosen,rejected,prompt,mask\n0.png,1.png,p,left.png\n"
    first = samples(text).fingerprint
    Image.open("left.png").transpose(Image.Transpose.ROTATE_180).save("left.png")
    assert samples(text).fingerprint != first


def test_labels_have_masks_and_levels(here):
    found = samples("image,prompt,label,mask,least_noise\n0.png,p,1,left.png,0.5\n1.png,q,0,,\n", labels=True)
    prompts, details = details_by_prompt(found)
    p = prompts.index("p")
    assert float(details.masks[0][p].amax()) == 2.0 and float(details.masks[0][1 - p].amin()) == 1.0 and float(details.least[p]) == 0.5


def test_images_have_masks_and_levels_where_the_objective_reads_them(here):
    (here / "images.csv").write_text("image,prompt,mask,least_noise\n0.png,p,left.png,0.5\n1.png,q,,\n")
    found, plain = (load_samples(Encoder(), "", "images.csv", SQUARE, details=read) for read in (True, False))
    prompts, details = details_by_prompt(found)
    p = prompts.index("p")
    assert float(details.masks[0][p].amax()) == 2.0 and details.least[[p, 1 - p]].tolist() == [0.5, 0.0]
    assert details_by_prompt(plain)[1] == Details() and "details" not in plain.fingerprint
    assert {name for name, cls in OBJECTIVES.items() if cls().data is Images and cls.reads_details} == {"tpo", "dro"}
    (here / "images.csv").write_text("image,prompt,least_noise\n0.png,p,2\n")
    with pytest.raises(ValueError, match="line 2: least_noise is '2': give a noise level from 0 to below 1"):
        load_samples(Encoder(), "", "images.csv", SQUARE, details=True)


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        ("least_noise", "1", "line 2: least_noise is '1': give a noise level from 0 to below 1, in flow units"),
        ("chosen_least_noise", "high", "line 2: least_noise is 'high': give a noise level"),
        ("chosen_caption", "a", "line 2: one image of the pair has a caption of its own: give both, or the prompt alone"),
        ("rejected_mask", "none.png", "line 2: the mask none.png does not exist"),
        ("mask", "black.png", "the mask black.png is black: nothing of 0.png would be trained"),
        ("mask", "wide.png", "the mask wide.png has 16×8 pixels and its image 8×8: give a mask of the image's size"),
    ],
)
def test_bad_columns_are_refused_in_one_line(columns, row, said, here):
    with pytest.raises(ValueError) as caught:
        samples(f"chosen,rejected,prompt,{columns}\n0.png,1.png,p,{row}\n")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_level_above_the_models_highest_is_refused_before_any_step(here):
    config = build(TrainConfig, {"out": "run", "objective": {"name": "diffusion-dpo"}, "pairs": "pairs.csv"})
    for level, refused in (("0.91", True), ("0.89", False)):
        parts = Parts(Family(), samples(f"chosen,rejected,prompt,least_noise\n0.png,1.png,p,{level}\n"), None)
        with (
            pytest.raises(ConfigError, match="least_noise = 0.91: the model's highest level is 0.9, in flow") if refused else nullcontext()
        ):
            check_settings(config, parts)


def test_what_cannot_carry_details_on_says_so(here):
    (here / "p.csv").write_text("chosen,rejected,prompt,mask\n0.png,1.png,p,left.png\n")
    assert len(read_pairs("p.csv", report := Report())) == 1
    assert "1 with captions, masks or least noise levels of images, which are left aside here (0.png)" in str(report)
