"""Reward models: parity with independent implementations, gradients, precision, batches; then what is built on top of them."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.parity import clip as independent_clip
from tests.parity import run as parity
from tests.parity.pixels import natural_images, pillow_error, pixel_batch, with_pillow
from trainer.demo import files as demo
from trainer.rewards.base import RewardModel
from trainer.rewards.compressibility import JpegSize
from trainer.rewards.mps import MPS
from trainer.rewards.preprocess import Fit, resize_and_crop, resize_and_pad
from trainer.rewards.python_file import PythonReward
from trainer.rewards.registry import REWARDS, WeightFolders, load
from trainer.rewards.weighted import RewardSpec, Standardised, WeightedSum, parse_weights

NAMES = list(parity.CASES)
FEW = ("ict", "hp")  # the others of their classes are tested in the default run
LONG = [pytest.param(name, marks=pytest.mark.full) if name in FEW else name for name in NAMES]


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Every reward on small random weights, and its independent scorer; each is made when it is first asked for."""

    class Opened(dict):
        def __missing__(self, name):
            self[name] = parity.open_case(name, tmp_path_factory.mktemp(name), parity.CASES[name].small)
            return self[name]

    return Opened()


def squares(n, size=224, seed=3):
    return torch.stack(natural_images([(size, size)] * n, seed))


@pytest.mark.parametrize("name", NAMES)
def test_each_port_agrees_with_an_independent_implementation(name, opened):
    error, expected = parity.relative_error(*opened[name])
    assert error < 1e-4
    assert expected.std() > 1e-2 * expected.abs().max()  # images and prompts do move these scores


def test_both_towers_agree_on_their_own(tmp_path):
    """Features, not only their products: image side for square and other images, text side for short and cut prompts."""
    model = independent_clip.transformers_clip(parity.SMALL_CLIP, 2)
    independent_clip.write_pickscore(tmp_path, parity.SMALL_CLIP)
    tower = load(f"pickscore@{tmp_path / 'model.safetensors'}", architecture=parity.SMALL_CLIP).reward
    images = natural_images()
    expected = independent_clip.image_features(model, pixel_batch(images, 224))
    torch.testing.assert_close(torch.cat([tower.image_features(i[None]) for i in images]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tower.text_features(parity.PROMPTS), independent_clip.text_features(model, parity.PROMPTS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ict"])
def test_gradients_of_the_pixels_are_those_of_finite_differences(name, opened):
    reward = opened[name][0]
    image = torch.stack(natural_images([(230, 250)], 5)).clamp(0.05, 0.95).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image, ["a fox"]).sum(), image)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    direction = gradient / gradient.norm()
    step = 0.3  # of a unit direction over 172 500 pixels: each moves by less than 0.01
    with torch.no_grad():
        moved = reward(torch.cat([image + step * direction, image - step * direction]), ["a fox"] * 2)
    assert float(moved[0] - moved[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.03)


@pytest.mark.parametrize("name", LONG)
def test_scores_do_not_depend_on_batch_mates(name, opened):
    reward, images, prompts = opened[name][0], squares(4), list(parity.PROMPTS)
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_mps_reads_only_the_words_above_its_threshold(opened):
    reward, scorer = opened["mps"]
    strict = MPS(reward, reward.cross, reward.tokenize, reward.fit, reward.scale, threshold=0.7)
    kept = torch.stack([p.keep for p in strict.encoded(parity.PROMPTS)])
    assert kept.any(1).all() and 0.05 < kept.float().mean() < 0.95
    images = squares(4)
    scores = strict(images, parity.PROMPTS)
    torch.testing.assert_close(scores, scorer(list(images), parity.PROMPTS, 0.7), rtol=1e-4, atol=1e-3)
    assert (scores - reward(images, parity.PROMPTS)).abs().max() > 0.1


@pytest.mark.parametrize("name", LONG)
def test_checkpointing_changes_neither_scores_nor_gradients(name, opened):
    reward = opened[name][0]
    results = []
    for enabled in (False, True):
        reward.gradient_checkpointing(enabled)
        images = squares(2).requires_grad_()
        scores = reward(images, ["a", "b"])
        results.append((scores.detach(), torch.autograd.grad(scores.sum(), images)[0]))
    reward.gradient_checkpointing(False)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LONG)
def test_bf16_moves_scores_by_at_most_a_twentieth_of_their_spread(name, opened, tmp_path):
    case = parity.CASES[name]
    case.write(tmp_path, case.small)
    assert parity.bf16_error(opened[name][0], parity.reopen(name, tmp_path, case.small, torch.bfloat16)) < 0.05


def test_bf16_moves_trained_scores_by_little():
    """The one reward here whose weights are trained."""
    from trainer.demo.world import real_images

    images, captions = real_images(64, 0)
    tower = demo.load_tower("proxy")
    full = tower(images, captions)
    tower.bfloat16()
    tower.forget()
    assert (tower(images, captions) - full).abs().mean() < 0.05 * full.std()


def test_every_distinct_prompt_is_encoded_once(opened):
    tower = opened["hpsv2.1"][0]
    tower.forget()
    read = []
    whole, tower.tokenize = tower.tokenize, lambda texts: (read.extend(texts), whole(texts))[1]
    tower(squares(3), ["a", "b", "a"])
    tower(squares(2), ["b", "c"])
    tower.tokenize = whole
    assert read == ["a", "b", "c"]


def test_a_score_made_in_inference_mode_still_trains_afterwards(opened):
    tower = opened["clip"][0]
    tower.forget()
    with torch.inference_mode():
        tower(squares(1), ["a prompt first seen inside"])
    images = squares(1).requires_grad_()
    tower(images, ["a prompt first seen inside"]).sum().backward()
    assert images.grad.abs().max() > 0


def test_prompts_and_images_must_pair_up(opened):
    for name in NAMES:
        if name not in ("aesthetic", "hp"):
            with pytest.raises(ValueError, match="1 prompts for 2 images: give one prompt per image"):
                opened[name][0](squares(2), ["a"])


def test_a_prompt_of_ten_thousand_characters_is_cut_to_what_the_tower_reads(opened):
    long = "word, " * 1667
    for name in ("hpsv2.1", "mps", "imagereward"):
        reward = opened[name][0]
        assert reward(squares(1), [long]).isfinite().all()
        torch.testing.assert_close(reward(squares(1), [long]), reward(squares(1), [long + " and what nobody reads"]))


# -- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", parity.RESIZED)
@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_tensor_preprocessing_agrees_with_pillows(size, rule):
    largest, mean = pillow_error(size, Fit(224, rule))
    assert largest <= 2 and mean <= 0.5


@pytest.mark.parametrize("size", [*parity.RESIZED, (300, 700), (224, 224)])
@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_bytes_are_fitted_as_pillow_fits_them(size, rule):
    image = (natural_images([size], 1)[0] * 255).round().byte()
    error = (Fit(224, rule).of_bytes(image).float() - with_pillow(image / 255, Fit(224, rule)) * 255).abs()
    assert error.max() <= 1.001 and error.mean() < 0.01


@pytest.mark.parametrize("size", [(300, 400), (100, 64), (224, 500), (64, 224)])
@pytest.mark.parametrize("fit", [resize_and_crop, resize_and_pad])
def test_deterministic_algorithms_resize_alike(fit, size):
    """PyTorch has no deterministic backward of antialiased bicubic on CUDA; matrix products take its place."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    results = []
    for deterministic in (False, True):
        pixels = images.clone().requires_grad_()
        torch.use_deterministic_algorithms(deterministic)
        try:
            fitted = fit(pixels, 224)
            fitted.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((fitted.detach(), pixels.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fit", [resize_and_crop, resize_and_pad])
@pytest.mark.parametrize("size", [(1, 1), (10, 20_000), (20_000, 10), (3, 224), (224, 224)])
def test_every_size_becomes_a_square(fit, size):
    made = fit(torch.full((1, 3, *size), 0.5), 224)
    assert made.shape == (1, 3, 224, 224) and made.min() >= 0 and made.max() <= 1
    of_bytes = fit(torch.full((1, 3, *size), 128, dtype=torch.uint8), 224)
    assert of_bytes.dtype is torch.uint8 and of_bytes.shape == made.shape and of_bytes.max() == 128
    if fit is resize_and_crop:
        torch.testing.assert_close(made, torch.full_like(made, 0.5))


def test_a_crop_of_a_very_wide_image_is_the_crop_of_all_of_it():
    image = torch.stack(natural_images([(20, 400)], 2))
    whole = F.interpolate(image, (224, 224 * 20), mode="bicubic", antialias=True).clamp(0, 1)[..., 112 * 19 : 112 * 19 + 224]
    torch.testing.assert_close(resize_and_crop(image, 224), whole, atol=1e-5, rtol=0)


# -- wrappers --------------------------------------------------------------------------------------------------------


def test_prefixed_scores_encode_the_image_once(opened):
    tower = opened["hpsv2.1"][0]
    images, prompts, prefixes = squares(3), ["a fox", "two cats", "a fox"], ["", "Realistic photo. "]
    expected = torch.stack([tower(images, [prefix + p for p in prompts]) for prefix in prefixes], 1)
    calls = []
    hook = tower.visual.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(tower.scores(images, prompts, prefixes), expected)
    hook.remove()
    assert len(calls) == 1
    with pytest.raises(TypeError, match="JpegSize cannot score an image under several prompts"):
        JpegSize(1).scores(images, prompts, prefixes)


class Brightness(RewardModel):
    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_weighted_sum_adds_standard_deviations():
    images = squares(4, 8)
    bright, size = RewardSpec("bright", Brightness(), 2.0, 0.5, 0.1), RewardSpec("size", JpegSize(1), -1.0, 1.0, 0.5)
    total = WeightedSum([bright, size])
    assert not total.differentiable
    expected = 2 * (Brightness()(images, []) - 0.5) / 0.1 - (JpegSize(1)(images, [""] * 4) - 1) / 0.5
    torch.testing.assert_close(total(images, [""] * 4), expected)
    raw = WeightedSum([RewardSpec("bright", Brightness(), 3.0)], raw=True)
    torch.testing.assert_close(raw(images, [""] * 4), 3 * Brightness()(images, []))
    with pytest.raises(ValueError, match="no mean and standard deviation are known for bright: measure them with"):
        WeightedSum([RewardSpec("bright", Brightness())])
    assert isinstance(bright.standardised, Standardised)


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hpsv2.1", [("hpsv2.1", 1.0)]),
        ("hpsv2.1=1, pickscore=0.5", [("hpsv2.1", 1.0), ("pickscore", 0.5)]),
        (["a=2", "b"], [("a", 2.0), ("b", 1.0)]),
        ("mps@/x/k=v.safetensors", [("mps@/x/k=v.safetensors", 1.0)]),
        ("compressibility=-1e-1", [("compressibility", -0.1)]),
    ],
)
def test_weights_are_read(spec, parsed):
    assert parse_weights(spec) == parsed


def test_a_path_that_exists_is_a_path_whatever_signs_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1", "a,b", "a,c=2"):
        (tmp_path / name).mkdir()
    assert parse_weights("lr=1") == [("lr=1", 1.0)] and parse_weights("lr=1=0.5, clip=2") == [("lr=1", 0.5), ("clip", 2.0)]
    assert parse_weights("a,b=3,clip") == [("a,b", 3.0), ("clip", 1.0)] and parse_weights(["clip, a,c=2"]) == [
        ("clip", 1.0),
        ("a,c=2", 1.0),
    ]
    assert parse_weights("hpsv2@lr=1,hpsv2.1@lr=1=2") == [("hpsv2@lr=1", 1.0), ("hpsv2.1@lr=1", 2.0)]
    assert parse_weights("lr=2") == [("lr", 2.0)]


def test_a_reward_given_twice_is_refused():
    with pytest.raises(ValueError, match="reward a is given twice"):
        parse_weights("a=1,a=2")


@pytest.mark.parametrize("spec", ["hpsv2.1=0", "hpsv2.1=0, pickscore=-0"])
def test_weights_that_are_all_zero_are_refused(spec):
    with pytest.raises(ValueError, match="the weight of hpsv2.1.* is 0, so that every score would be 0"):
        parse_weights(spec)
    assert parse_weights(spec + ", clip=1")[-1] == ("clip", 1.0)  # beside another, a weight of 0 is a column


def test_compressibility_is_the_size_of_the_jpeg():
    noisy, flat = squares(1, 64), torch.full((1, 3, 64, 64), 0.5)
    buffer = io.BytesIO()
    Image.fromarray((noisy[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    assert float(JpegSize(1)(noisy, [""])) == pytest.approx(len(buffer.getvalue()) / 1000)
    assert JpegSize(-1)(flat, [""]) > JpegSize(-1)(noisy, [""]) and not load("compressibility").reward.differentiable


OWN = "import torch\n{flag}\ndef reward(images, prompts):\n    return {body}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function reward"),
        ("raise RuntimeError('no')", "fails when it is imported: RuntimeError: no"),
        (OWN.format(flag="", body="images"), r"returned \(2, 3, 8, 8\) for 2 images"),
        (OWN.format(flag="", body="[1, 2]"), "returned list for 2 images"),
        (OWN.format(flag="", body="images.mean((1, 2, 3)) / 0"), "not finite"),
    ],
)
def test_a_faulty_reward_of_ones_own_is_said_to_be(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "mine.py")).reward(squares(2, 8), ["a", "b"])


def test_a_reward_of_ones_own_that_loses_the_gradient_is_said_to(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.format(flag="", body="images.detach().mean((1, 2, 3))"))
    own = load(str(tmp_path / "mine.py")).reward
    assert own(squares(1, 8), ["a"]).shape == (1,)
    with pytest.raises(ValueError, match="no gradient reaches the pixels"):
        own(squares(1, 8).requires_grad_(), ["a"])


def test_a_reward_of_ones_own_scores_and_says_whether_it_has_a_gradient(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.format(flag="DIFFERENTIABLE = False", body="images.mean((1, 2, 3))"))
    own = load(str(tmp_path / "mine.py")).reward
    assert isinstance(own, PythonReward) and not own.differentiable
    torch.testing.assert_close(own(squares(2, 8), ["a", "b"]), squares(2, 8).mean((1, 2, 3)))


def test_reward_folders_load_through_the_same_door(reward_folder):
    part = load(str(reward_folder))
    assert (part.mean, part.std) == (0.0, 1.0) and part.reward(squares(2, 64), ["a red star", "a blue ring"]).shape == (2,)


def test_every_name_has_a_licence_and_a_source():
    for name, entry in REWARDS.items():
        assert entry.licence and entry.source, name
        assert isinstance(Path(name), Path) and all(f.repository.count("/") == 1 for f in entry.files.values())


# -- as the commands name them ---------------------------------------------------------------------------------------


def test_a_config_names_sums_and_rewards_of_ones_own(tmp_path):
    from trainer.rewards.registry import load_reward

    (tmp_path / "mine.py").write_text(OWN.format(flag="", body="images.mean((1, 2, 3))"))
    images, prompts = squares(3, 64), ["a red star", "a blue ring", "a red star"]
    proxy, heldout = (demo.load_reward(n)(images, prompts) for n in ("proxy", "heldout"))
    torch.testing.assert_close(load_reward("demo-proxy", True)(images, prompts), proxy)
    torch.testing.assert_close(load_reward("demo-proxy=1, demo-heldout=0.5", True)(images, prompts), proxy + 0.5 * heldout)
    torch.testing.assert_close(load_reward(str(tmp_path / "mine.py"), False)(images, prompts), images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="rewards calibrate"):
        load_reward(str(tmp_path / "mine.py"), True)


@pytest.mark.parametrize("text", ["[]", "{", '{"mean": 1}', '{"mean": 1, "std": 0}', '{"mean": "x", "std": 1}', '{"mean": NaN, "std": 1}'])
def test_broken_statistics_are_refused_with_their_file_and_the_remedy(text, tmp_path):
    from trainer.rewards.registry import WeightFolders

    (tmp_path / "own.statistics.json").write_text(text)
    with pytest.raises(ValueError, match="own.statistics.json does not hold .*`rewards calibrate`"):
        WeightFolders([tmp_path]).read_statistics(str(tmp_path / "own.py"))


def test_weights_that_are_no_numbers_and_files_that_nothing_reads_are_refused(tmp_path):
    from trainer.rewards.registry import load
    from trainer.rewards.weighted import parse_weights

    for weight in ("nan", "inf", "-inf"):
        with pytest.raises(ValueError, match="weight of demo-proxy is not a finite number"):
            parse_weights(f"demo-proxy={weight}")
    with pytest.raises(ValueError, match="takes no weight file"):
        load(f"demo-proxy@{tmp_path / 'x.safetensors'}")


def test_a_mistake_in_a_reward_of_ones_own_names_the_file_and_the_exception(tmp_path):
    from trainer.rewards.python_file import PythonReward

    path = tmp_path / "own.py"
    mistakes = {
        "{}['missing']": "KeyError: 'missing'",
        "images.view(7)": "RuntimeError: shape",
        "exec('raise RuntimeError(5)')": "RuntimeError: 5",
    }
    for mistake, said in mistakes.items():
        path.write_text(f"def reward(images, prompts):\n    return {mistake}\n")
        with pytest.raises(ValueError, match=rf"own.py: reward\(\) failed: {said}.* \(line 2\)$"):
            PythonReward.load(path)(torch.rand(1, 3, 8, 8), ["a"])
    path.write_text("import torch\n\ndef reward(images, prompts):\n    raise torch.OutOfMemoryError('no memory')\n")
    with pytest.raises(torch.OutOfMemoryError):
        PythonReward.load(path)(torch.rand(1, 3, 8, 8), ["a"])


def test_a_sum_recomputes_activations_in_every_part_that_can(reward_folder):
    from trainer.rewards.registry import load_reward

    total = load_reward(f"{reward_folder}=2, demo-proxy=1", True)
    total.gradient_checkpointing(True)
    transformer, residual = total.rewards
    assert transformer.reward.visual.transformer.grad_checkpointing
    assert transformer.supports_gradient_checkpointing and not residual.supports_gradient_checkpointing


def test_a_text_has_the_same_features_in_any_company():
    """To the last bit: a resumed run meets its prompts in other batches than the run that was not stopped."""
    prompts = ["a red star", "a ring", "three blue discs on green", "a large yellow square"]
    together, alone = (demo.load_tower("proxy") for _ in range(2))
    expected = torch.cat([alone.text_features([prompt]) for prompt in prompts])
    assert torch.equal(together.text_features(prompts), expected)


# -- files of one's own as people have them --------------------------------------------------------------------------


def write_own(folder, shift, name="warm"):
    """A reward file with dataclasses, postponed annotations, a module beside it, imported late too, and a weight file."""
    folder.mkdir()
    (folder / "helper.py").write_text(f"SHIFT = {shift}\n")
    (folder / "late").mkdir()
    (folder / "late" / "__init__.py").write_text(f"SCALE = {shift + 1}\n")
    torch.save({"w": torch.tensor(float(shift))}, folder / "head.pt")
    (folder / f"{name}.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom pathlib import Path\n"
        "import torch\nfrom helper import SHIFT\n"
        "@dataclass\nclass Settings:\n    parts: list[int] = field(default_factory=list)\n    scale: float = 1.0\n"
        "W = torch.load(Path(__file__).parent / 'head.pt', weights_only=True)['w']\n"
        "def reward(images, prompts):\n    import late\n"
        "    return images.mean((1, 2, 3)) * Settings().scale + SHIFT + 10 * late.SCALE + 100 * W\n"
    )
    return folder / f"{name}.py"


def test_two_files_of_one_name_keep_their_own_modules_beside_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "helper", other := ModuleType("helper"))  # another program's
    monkeypatch.chdir(tmp_path)
    paths = [write_own(tmp_path / folder, shift) for folder, shift in (("a", 1), ("b", 5))]
    one, two = (load(str(path.relative_to(tmp_path))).reward for path in paths)
    monkeypatch.chdir(tmp_path.parent)  # __file__ stays right
    images = squares(2, 8)
    for _ in range(2):
        for reward, shift in ((one, 1), (two, 5)):
            torch.testing.assert_close(reward(images, ["a", "b"]), images.mean((1, 2, 3)) + shift + 10 * (shift + 1) + 100 * shift)
    assert sys.modules["helper"] is other and "late" not in sys.modules
    assert copy.deepcopy(one)(images, ["a", "b"]).shape == (2,)  # ComfyUI's nodes copy rewards to other devices


def test_a_path_from_the_files_folder_gets_the_remedy(tmp_path, monkeypatch):
    path = write_own(tmp_path / "own", 1)
    path.write_text(path.read_text().replace("Path(__file__).parent / 'head.pt'", "'head.pt'"))
    with pytest.raises(
        ValueError, match=r"own.warm.py fails when it is imported: FileNotFoundError: .*write Path\(__file__\).parent / 'head"
    ):
        load(str(path))
    path.write_text("def reward(images, prompts):\n    open('head.pt')\n")
    with pytest.raises(ValueError, match=r"reward\(\) failed: FileNotFoundError: .*write Path\(__file__\).parent / 'head.pt'"):
        load(str(path)).reward(squares(1, 8), ["a"])
    path.write_text("import sys\nsys.exit()\n")
    with pytest.raises(ValueError, match="fails when it is imported: SystemExit"):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"mean": 1}', "it has no std"), ("[]", "it is not a JSON object"), (f'{{"mean": {10**400}, "std": 1}}', "mean is not a number")],
)
def test_statistics_that_lack_a_key_name_it(text, why, reward_folder, tmp_path):
    (tmp_path / "own.statistics.json").write_text(text)
    with pytest.raises(ValueError, match=rf"own.statistics.json does not hold .* \({why}\): measure again"):
        WeightFolders().read_statistics(str(tmp_path / "own.py"))


def test_a_reward_folder_whose_config_lacks_a_key_names_it(reward_folder, tmp_path):
    shutil.copytree(reward_folder, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    for key in ("mean", "std", "scale", "embed_dim", "vision_cfg", "text_cfg"):
        (tmp_path / "folder" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(ValueError, match=rf"config.json .*has no '?{key}'?[:;] take the file"):
            load(str(tmp_path / "folder"))


def test_statistics_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "own.statistics.json").write_text('{"mean": 1, "std": 2}', "utf-8-sig")
    assert WeightFolders().read_statistics(str(tmp_path / "own.py")) == (1.0, 2.0)


ODD = [
    "a ‘curly’ quote",
    "fish &amp; chips",
    "ﬁne ligature",
    "ｆｕｌｌ width",
    "cafÃ© mojibake",
    "e\u0301 combining",
    "tabs\t and\n lines",
    "it's 12 GBs…",
    "ÀÉ ẞ",
    "",
]


@pytest.fixture(scope="module")
def transformers_tokens(tmp_path_factory):
    """transformers' CLIPTokenizer with open_clip's vocabulary, as the processors of PickScore and MPS are."""
    import gzip

    from open_clip.tokenizer import SimpleTokenizer, default_bpe
    from transformers import CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in SimpleTokenizer().encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return lambda texts: CLIPTokenizerFast.from_pretrained(folder)(texts, truncation=True, max_length=77)["input_ids"]


def test_pickscore_and_mps_read_prompts_as_transformers_does_and_hps_as_open_clip(opened, transformers_tokens):
    from open_clip.tokenizer import SimpleTokenizer

    expected, differ = transformers_tokens(ODD), 0
    for text, ids in zip(ODD, expected):
        for name in ("pickscore", "mps"):
            row = opened[name][0].tokenize([text])[0]
            assert row[: len(ids)].tolist() == ids and int(row[len(ids) :].abs().sum()) == 0, (name, text)
        repaired = opened["hpsv2.1"][0].tokenize([text])[0]
        assert torch.equal(repaired, SimpleTokenizer()([text])[0]), text
        differ += not torch.equal(repaired, row)
    assert differ >= 5


def test_mps_has_both_thresholds_by_name(tmp_path):
    assert [load(name, "meta").reward.threshold for name in ("mps", "mps-0.01")] == [0.3, 0.01]
    assert REWARDS["mps"].files == REWARDS["mps-0.01"].files


def test_one_image_without_a_finite_score_costs_the_others_nothing(tmp_path):
    from trainer.scoring.items import Item
    from trainer.scoring.scorer import score

    (tmp_path / "own.py").write_text("def reward(images, prompts):\n    means = images.mean((1, 2, 3))\n    return (means - 0.5).sqrt()\n")
    for name, value in (("dark", 10), ("light", 250), ("grey", 200)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.png")
    items = [Item(tmp_path / f"{name}.png", "a") for name in ("light", "dark", "grey")]
    rows = list(score(items, [load(str(tmp_path / "own.py"))]))
    values = [next(iter(row.raw.values()), None) for row in rows]
    assert values == [pytest.approx((250 / 255 - 0.5) ** 0.5), None, pytest.approx((200 / 255 - 0.5) ** 0.5)]
    assert "dark.png" in rows[1].error and rows[1].error.endswith("gave nan") and not rows[0].error


def test_hp_finds_its_backbone_in_a_copy_of_the_whole_repository(tmp_path):
    """As the authors' evaluation lays it out: `HP/hp_scorer/mlp_pytorch_model.bin` and `HP/hp_backbone/pytorch_model.bin`."""
    scorer = parity.CASES["hp"].write(tmp_path, parity.SMALL_CLIP)
    for file, place in (("mlp_pytorch_model.bin", "hp_scorer"), ("pytorch_model.bin", "hp_backbone")):
        (tmp_path / "hp" / place).mkdir(parents=True)
        (tmp_path / file).rename(tmp_path / "hp" / place / file)
    image = natural_images()[:1]
    named = load("hp", folders=WeightFolders([tmp_path]), architecture=parity.SMALL_CLIP).reward
    given = load(f"hp@{tmp_path / 'hp/hp_scorer/mlp_pytorch_model.bin'}", architecture=parity.SMALL_CLIP).reward
    for reward in (named, given):
        torch.testing.assert_close(reward(image[0][None], [""]), scorer(image, [""]), rtol=1e-5, atol=1e-6)
