"""Each reward against an independent implementation, on random weights in the layout of the released files.

`python -m trainer.rewards.parity` prints the table of docs/rewards.md at the real sizes; the tests run the same at small ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..reward import Reward
from .clip import ARCHITECTURES, tokenizer
from .image_reward import ARCHITECTURE, TOKENS
from .mps import CONDITION
from .preprocess import CLIP_MEAN, CLIP_STD, Fit
from .registry import REWARDS, load

PROMPTS = (
    "a photo of a red fox in the snow",
    "An astronaut riding a horse, oil painting, detailed",
    "two cats",
    "a very long prompt " * 60,
)
SIZES = ((224, 224), (300, 300), (320, 200), (180, 333))  # square and not, larger and smaller than the towers' 224
RESIZED = ((512, 512), (640, 384), (333, 500), (150, 100), (1024, 1024))

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 160, "head_width": 80, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
SMALL_BLIP: dict[str, dict[str, int]] = {
    "image": {"size": 224, "patch": 32, "width": 96, "depth": 3, "heads": 4},
    "text": {"vocabulary": 200, "width": 64, "depth": 2, "heads": 4, "wide": 128},
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz",
    *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ",",
    "fox",
    "red",
]


@dataclass(frozen=True)
class Case:
    """One reward: `write` puts random weights into a folder and returns the independent scorer of (pixels 0…1, prompts)."""

    write: Callable[[Path, Mapping[str, Any]], Callable[[Sequence[Tensor], Sequence[str]], Tensor]]
    small: Mapping[str, Any]
    full: Mapping[str, Any]
    against: str


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every part of a model shows in its score: matrices keep variance, vectors vary by a tenth."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=draws)
            if name.endswith("logit_scale"):
                p.fill_(4.6)
            elif p.ndim < 2:
                p.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))  # norms' weights are about 1, all else about 0
            else:
                p.copy_(noise / p[0].numel() ** 0.5 if "embedding" not in name and "pos_embed" not in name else 0.3 * noise)
    return module.eval().requires_grad_(False)


def pictures(sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[Tensor]:
    """Natural-like images (3,H,W) in [0,1]: noise whose amplitude falls with frequency, as photographs' does."""
    draws = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for height, width in sizes:
        rates = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt().clamp(min=1 / max(height, width))
        spectrum = torch.fft.rfft2(torch.randn(3, height, width, generator=draws)) / rates
        image = torch.fft.irfft2(spectrum, s=(height, width))
        image = image + image.mean(0, keepdim=True)  # the channels of a photograph agree
        made.append((0.5 + 0.22 * (image - image.mean()) / image.std()).clamp(0, 1))
    return made


# -- the independent side: transformers' models, a resize by matrices, and plain loops ------------------------------


def _cubic(length: int, target: int) -> Tensor:
    """Pillow's bicubic weights (target, length): Keys' kernel with a = −½, widened when shrinking, cut and renormalised at the edges."""
    scale = length / target
    centres = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale - 0.5
    x = (torch.arange(length, dtype=torch.float64) - centres).abs() / max(scale, 1.0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(1, keepdim=True)


def _pixels(image: Tensor, size: int, pad: bool) -> Tensor:
    height, width = image.shape[-2:]
    if pad:
        scale = size / max(height, width)
        target = (round(height * scale), round(width * scale))
    else:
        shorter = min(height, width)
        target = (int(size * height / shorter), int(size * width / shorter))
    wide = (image.double() @ _cubic(width, target[1]).T).clip(0, 1)
    resized = (_cubic(height, target[0]) @ wide).clip(0, 1).float()
    if pad:
        top, left = ((size - side) // 2 for side in target)
        square = torch.zeros(3, size, size)
        square[:, top : top + target[0], left : left + target[1]] = resized
    else:
        top, left = (round((side - size) / 2) for side in target)
        square = resized[:, top : top + size, left : left + size]
    return (square - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def with_pillow(image: Tensor, fit: Fit) -> Tensor:
    """What `fit` makes of one image (3,H,W), by way of 8-bit pictures and Pillow, as the original packages do it."""
    import numpy as np
    from PIL import Image

    height, width = image.shape[-2:]
    side = min(height, width) if fit.rule == "crop" else max(height, width)
    whole = int if fit.rule == "crop" else round
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    picture = picture.resize((whole(width * fit.size / side), whole(height * fit.size / side)), Image.Resampling.BICUBIC)
    if fit.rule == "crop":
        left, top = round((picture.width - fit.size) / 2), round((picture.height - fit.size) / 2)
        square = picture.crop((left, top, left + fit.size, top + fit.size))
    else:
        square = Image.new("RGB", (fit.size, fit.size))
        square.paste(picture, ((fit.size - picture.width) // 2, (fit.size - picture.height) // 2))
    return torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) / 255


def pillow_error(size: tuple[int, int], fit: Fit) -> tuple[float, float]:
    """Largest and mean |tensor − Pillow| of one natural-like image, in 255ths."""
    (image,) = pictures([size], 1)
    image = (image * 255).round() / 255
    error = (fit(image[None])[0] - with_pillow(image, fit)).abs() * 255
    return float(error.max()), float(error.mean())


def _batch(images: Sequence[Tensor], size: int, pad: bool = False) -> Tensor:
    return torch.stack([_pixels(image, size, pad) for image in images])


def _transformers_clip(architecture: Mapping[str, Any], seed: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    vision, text, act = architecture["vision_cfg"], architecture["text_cfg"], "quick_gelu" if architecture["quick_gelu"] else "gelu"
    config = CLIPConfig(
        projection_dim=architecture["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": act,
            "projection_dim": architecture["embed_dim"],
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "hidden_act": act,
            "eos_token_id": 49407,
            "projection_dim": architecture["embed_dim"],
        },
    )
    return randomise(CLIPModel(config), seed)


def _images(model: Any, pixels: Tensor) -> Tensor:
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def _texts(model: Any, prompts: Sequence[str]) -> Tensor:
    return F.normalize(model.text_projection(model.text_model(input_ids=tokenizer()(prompts)).pooler_output), dim=-1)


def _as_open_clip(model: Any) -> dict[str, Tensor]:
    """transformers' CLIPModel in open_clip's layout, tensor by tensor, written apart from the port's own renaming."""
    state: dict[str, Tensor] = {"logit_scale": model.logit_scale}
    v, t = model.vision_model, model.text_model
    state["visual.class_embedding"] = v.embeddings.class_embedding
    state["visual.conv1.weight"] = v.embeddings.patch_embedding.weight
    state["visual.positional_embedding"] = v.embeddings.position_embedding.weight
    state["visual.proj"], state["text_projection"] = model.visual_projection.weight.T, model.text_projection.weight.T
    state["token_embedding.weight"] = t.embeddings.token_embedding.weight
    state["positional_embedding"] = t.embeddings.position_embedding.weight
    norms = {"visual.ln_pre": v.pre_layrnorm, "visual.ln_post": v.post_layernorm, "ln_final": t.final_layer_norm}
    linears: dict[str, Any] = {}
    for prefix, encoder in (("visual.transformer", v.encoder), ("transformer", t.encoder)):
        for i, block in enumerate(encoder.layers):
            at = f"{prefix}.resblocks.{i}."
            norms |= {at + "ln_1": block.layer_norm1, at + "ln_2": block.layer_norm2}
            linears |= {at + "attn.out_proj": block.self_attn.out_proj, at + "mlp.c_fc": block.mlp.fc1, at + "mlp.c_proj": block.mlp.fc2}
            qkv = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            state[at + "attn.in_proj_weight"] = torch.cat([part.weight for part in qkv])
            state[at + "attn.in_proj_bias"] = torch.cat([part.bias for part in qkv])
    for name, module in (norms | linears).items():
        state[name + ".weight"], state[name + ".bias"] = module.weight, module.bias
    return {k: x.detach().clone().contiguous() for k, x in state.items()}


def _write_hps(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = _transformers_clip(architecture, 1), architecture["vision_cfg"]["image_size"]
    torch.save({"state_dict": _as_open_clip(model)}, folder / "HPS_v2.1_compressed.pt")
    return lambda images, prompts: (_images(model, _batch(images, size, pad=True)) * _texts(model, prompts)).sum(-1)


def _write_pickscore(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = _transformers_clip(architecture, 2), architecture["vision_cfg"]["image_size"]
    save_file({k: x.clone().contiguous() for k, x in model.state_dict().items()}, folder / "model.safetensors")
    return lambda images, prompts: model.logit_scale.exp() * (_images(model, _batch(images, size)) * _texts(model, prompts)).sum(-1)


def _write_clip(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = _transformers_clip(architecture, 3), architecture["vision_cfg"]["image_size"]
    save_file(_as_open_clip(model), folder / "open_clip_model.safetensors")
    return lambda images, prompts: (_images(model, _batch(images, size)) * _texts(model, prompts)).sum(-1)


def _head(width: int, seed: int) -> dict[str, Tensor]:
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = randomise(nn.ModuleDict({str(i): nn.Linear(*size) for i, size in sizes.items()}), seed)
    return {f"layers.{k}": x.clone() for k, x in layers.state_dict().items()}


def _apply_head(head: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for i in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    return x[:, 0]


def _write_aesthetic(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size = _transformers_clip(architecture, 4), architecture["vision_cfg"]["image_size"]
    head = _head(architecture["embed_dim"], 5)
    save_file(_as_open_clip(model), folder / "open_clip_model.safetensors")
    torch.save(head, folder / "aesthetic-model.pth")
    return lambda images, prompts: _apply_head(head, _images(model, _batch(images, size)))


def _write_image_reward(folder: Path, architecture: Mapping[str, Any]) -> Any:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    image, text = architecture["image"], architecture["text"]
    vision: Any = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=image["width"],
            intermediate_size=4 * image["width"],
            num_hidden_layers=image["depth"],
            num_attention_heads=image["heads"],
            image_size=image["size"],
            patch_size=image["patch"],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
    )
    words: Any = BlipTextModel(
        BlipTextConfig(
            vocab_size=text["vocabulary"],
            hidden_size=text["width"],
            encoder_hidden_size=image["width"],
            intermediate_size=text["wide"],
            num_hidden_layers=text["depth"],
            num_attention_heads=text["heads"],
            max_position_embeddings=512,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    )
    randomise(vision, 6)
    randomise(words, 7)
    head = _head(text["width"], 8)
    e = vision.embeddings
    tower = {
        "cls_token": e.class_embedding,
        "pos_embed": e.position_embedding,
        "patch_embed.proj.weight": e.patch_embedding.weight,
        "patch_embed.proj.bias": e.patch_embedding.bias,
        "norm.weight": vision.post_layernorm.weight,
        "norm.bias": vision.post_layernorm.bias,
    }
    for i, block in enumerate(vision.encoder.layers):
        parts = {"norm1": block.layer_norm1, "norm2": block.layer_norm2, "attn.qkv": block.self_attn.qkv}
        parts |= {"attn.proj": block.self_attn.projection, "mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2}
        for name, module in parts.items():
            tower |= {f"blocks.{i}.{name}.weight": module.weight, f"blocks.{i}.{name}.bias": module.bias}
    state = {f"blip.visual_encoder.{k}": x.detach().clone() for k, x in tower.items()}
    state |= {f"blip.text_encoder.{k}": x.clone() for k, x in words.state_dict().items()}
    state |= {f"mlp.{k}": x for k, x in head.items()}
    state |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "blip.vision_proj.weight": torch.zeros(256, image["width"]),
    }
    torch.save(state, folder / "ImageReward.pt")
    vocabulary = [*WORDS, *(f"[unused{i}]" for i in range(text["vocabulary"] - len(WORDS)))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    reader: Any = BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, do_lower_case=True)

    def score(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        seen = vision(pixel_values=_batch(images, image["size"])).last_hidden_state
        read = reader(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        hidden = words(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        return _apply_head(head, hidden[:, 0])

    return score


def _write_mps(folder: Path, architecture: Mapping[str, Any]) -> Any:
    model, size, dim = _transformers_clip(architecture, 9), architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
    draws = torch.Generator().manual_seed(10)
    state = {f"mps.model.{k}": x.clone().contiguous() for k, x in model.state_dict().items()}
    shapes = {"to_q": (dim, dim), "to_kv": (128, dim), "to_out": (dim, dim), "ff.0": (8 * dim, dim), "ff.2": (dim, 4 * dim)}
    fused = {"fused_attn_ff_proj": (9 * dim + 128, dim), "attn_out": (dim, dim), "ff_out.1": (dim, 4 * dim)}
    for layer in range(4):
        for part, table in ((0, shapes), (1, fused)):
            at = f"mps.cross_model.layers.{layer}.{part}.fn."
            for name, shape in table.items():
                state[f"{at}{name}.weight"] = torch.randn(shape, generator=draws) / shape[1] ** 0.5
            state[at + "norm.weight"], state[at + "norm.bias"] = 1 + 0.1 * torch.randn(dim, generator=draws), torch.zeros(dim)
        state[f"mps.cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    save_file(state, folder / "model.safetensors")
    weights = {k.removeprefix("mps.cross_model.layers."): x for k, x in state.items() if "cross_model" in k}

    def score(images: Sequence[Tensor], prompts: Sequence[str], threshold: float = 0.3) -> Tensor:
        return torch.stack([_mps_of_one(model, weights, _pixels(i, size, False), p, threshold) for i, p in zip(images, prompts)])

    return score


def _mps_of_one(model: Any, weights: Mapping[str, Tensor], pixels: Tensor, prompt: str, threshold: float) -> Tensor:
    """One image, one prompt, head by head, as the paper's text and the released code describe it."""
    end = 49407

    def read(text: str) -> tuple[Tensor, int]:
        ids = tokenizer()([text])[0]
        stop = ids.tolist().index(end)
        ids[stop:] = end
        return model.text_projection(model.text_model(input_ids=ids[None]).last_hidden_state)[0], stop

    words, stop = read(prompt)
    condition, _ = read(CONDITION)
    affinity = torch.tensor([max(float(w @ c) for c in condition) for w in words])
    kept = [i for i in range(len(words)) if float(affinity[i] / affinity.max()) > threshold]
    x = model.visual_projection(model.vision_model(pixel_values=pixels[None]).last_hidden_state)[0]
    dim = x.shape[1]

    def norm(tokens: Tensor, scale: Tensor) -> Tensor:
        centred = tokens - tokens.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale

    def gated(tokens: Tensor) -> Tensor:
        first, second = tokens[:, : tokens.shape[1] // 2], tokens[:, tokens.shape[1] // 2 :]
        return second * torch.sigmoid(second) * first

    def turned(tokens: Tensor) -> Tensor:
        pairs = torch.complex(tokens[:, :32], tokens[:, 32:])  # a half-rotation pairs dimension i with i + 32
        angles = torch.arange(len(tokens))[:, None] / 10000 ** (torch.arange(32) / 32)
        spun = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([spun.real, spun.imag], 1)

    def heads(q: Tensor, k: Tensor, v: Tensor, turn: bool) -> Tensor:
        outs: list[Tensor] = []
        for h in range(dim // 64):
            asked = q[:, 64 * h : 64 * h + 64]
            asked, answered = (turned(asked), turned(k)) if turn else (asked, k)
            outs.append(torch.softmax(asked @ answered.T / 8, 1) @ v)
        return torch.cat(outs, 1)

    for layer in range(4):
        w = {k.removeprefix(f"{layer}.0.fn."): t for k, t in weights.items() if k.startswith(f"{layer}.0.")}
        y, kv = norm(x, w["norm.weight"]), words[kept] @ w["to_kv.weight"].T
        seen = heads(y @ w["to_q.weight"].T, kv[:, :64], kv[:, 64:], False)
        x = x + seen @ w["to_out.weight"].T + gated(y @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.removeprefix(f"{layer}.1.fn."): t for k, t in weights.items() if k.startswith(f"{layer}.1.")}
        q, k, v, ff = (norm(x, w["norm.weight"]) @ w["fused_attn_ff_proj.weight"].T).split([dim, 64, 64, 8 * dim], 1)
        x = x + heads(q, k, v, True) @ w["attn_out.weight"].T + gated(ff) @ w["ff_out.1.weight"].T
    return model.logit_scale.exp() * F.cosine_similarity(words[stop], x[0], dim=0)


_H = ARCHITECTURES["ViT-H-14"]
CASES: dict[str, Case] = {
    "hpsv2.1": Case(_write_hps, SMALL_CLIP, _H, "transformers' CLIPModel"),
    "pickscore": Case(_write_pickscore, SMALL_CLIP, _H, "transformers' CLIPModel"),
    "clip": Case(_write_clip, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-B-32"], "transformers' CLIPModel"),
    "clip-l14": Case(_write_clip, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-L-14"], "transformers' CLIPModel"),
    "imagereward": Case(_write_image_reward, SMALL_BLIP, ARCHITECTURE, "transformers' BLIP vision and text models"),
    "mps": Case(_write_mps, SMALL_CLIP, _H, "transformers' CLIPModel and a cross model written out head by head"),
    "aesthetic": Case(_write_aesthetic, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-L-14"], "transformers' CLIPModel"),
}


def open_case(
    name: str, folder: Path, architecture: Mapping[str, Any]
) -> tuple[Reward, Callable[[Sequence[Tensor], Sequence[str]], Tensor]]:
    """The reward, loaded from random weights in `folder`, and its independent scorer."""
    scorer = CASES[name].write(folder, architecture)
    return reopen(name, folder, architecture), scorer


def reopen(name: str, folder: Path, architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Reward:
    """The reward whose weights `open_case` wrote."""
    own = REWARDS[name].files["weights"].name
    return load(f"{name}@{folder / own}", dtype=dtype, architecture=architecture).reward


@torch.no_grad()
def relative_error(reward: Reward, scorer: Callable[[Sequence[Tensor], Sequence[str]], Tensor]) -> tuple[float, Tensor]:
    """Largest |port − independent| over the largest |independent|, and the independent scores, over SIZES and PROMPTS."""
    images = pictures()
    expected = scorer(images, PROMPTS)
    ours = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS)])
    return float((ours - expected).abs().max() / expected.abs().max()), expected


@torch.no_grad()
def bf16_error(reward: Reward, half: Reward) -> float:
    """Mean |bf16 − fp32| over the standard deviation of the fp32 scores of 64 images, each under its own prompt."""
    styles = ("oil painting of a", "photo of a", "sketch of an old", "tiny red", "huge blue", "golden", "two", "a city with a")
    things = ("fox", "castle", "ship", "tree", "car", "portrait", "lake", "robot")
    images, prompts = torch.stack(pictures([(224, 224)] * 64, 3)), [f"{style} {thing}" for style in styles for thing in things]
    full = reward(images, prompts)
    return float((half(images, prompts) - full).abs().mean() / full.std())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, one reward at a time: at the real sizes each needs up to 13 GB and some minutes; bf16 is measured small."""
    parser = argparse.ArgumentParser(prog="python -m trainer.rewards.parity", description=main.__doc__)
    parser.add_argument("--reward", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--small", action="store_true", help="shrunken models, as in the tests")
    parsed = parser.parse_args(arguments)
    print("| reward | against | largest relative difference | bf16: mean change / s.d. |\n|---|---|---|---|", flush=True)
    for name in parsed.reward or CASES:
        case = CASES[name]
        architecture = case.small if parsed.small else case.full
        with tempfile.TemporaryDirectory() as folder:
            reward, scorer = open_case(name, Path(folder), architecture)
            error, _ = relative_error(reward, scorer)
            change = f"{bf16_error(reward, reopen(name, Path(folder), architecture, torch.bfloat16)):.1%}" if parsed.small else "–"
        print(f"| {name} | {case.against} | {error:.1e} | {change} |", flush=True)
    print("\n| preprocessing | image | largest difference to Pillow, /255 | mean |\n|---|---|---|---|")
    for fit in (Fit(224, "crop"), Fit(224, "pad")):
        for size in RESIZED:
            largest, mean = pillow_error(size, fit)
            print(f"| {fit.rule} | {size[1]}×{size[0]} | {largest:.2f} | {mean:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
