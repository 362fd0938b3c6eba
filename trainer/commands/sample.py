"""`python -m trainer sample`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import ConfigError, plain
from ..data import images
from ..generate import generate, generate_base
from ..lora.file import load_lora, read_lora
from ..models.load import TUNED_UNET, with_unet
from ..sampling import Switch
from .options import configure_generation, generation_of, policy_of, prompts_of


def _fresh_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to write into it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from error


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--lora", type=Path, help="LoRA of the tuned model; without it the base draws every step")
    parser.add_argument(
        "--tuned-unet", type=Path, help="diffusers UNet folder of the tuned model, instead (default: fine_tuned_unet of the model's folder)"
    )
    parser.add_argument(
        "--switch", default="auto", help="where the tuned model takes over: auto (from the LoRA), 15, 75%%, sigma=0.63; 0 is tuned only"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the LoRA (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that has files")
    configure_generation(parser)


def _tuned_unet(args: argparse.Namespace) -> Path | None:
    """A whole UNet as the tuned model: the one that is named, or the one in the authors' layout."""
    if args.tuned_unet is not None and args.lora is not None:
        raise ConfigError("the tuned model is a LoRA or a UNet: give --lora or --tuned-unet")
    published = Path(args.model) / TUNED_UNET
    return args.tuned_unet or (published if args.lora is None and published.is_dir() else None)


def run(args: argparse.Namespace) -> int:
    """Generate images: base first, tuned model from the switch on."""
    settings, prompts = generation_of(args), prompts_of(args)
    base = policy_of(args)
    unet = _tuned_unet(args)
    if unet is not None:
        if args.switch == "auto":
            raise ConfigError(f"{unet} recommends no switch: give --switch (its authors: 75% for SD1.5, 87.5% for SDXL)")
        switched = Switch.parse(args.switch).index(base.sigmas(settings.steps))
        drawn = generate(base, {"tuned": with_unet(base, unet)}, prompts, [switched], settings)["tuned", switched]
    elif args.lora is None:
        drawn, switched = generate_base(base, prompts, settings), None
    else:
        sigmas = base.sigmas(settings.steps)
        _, metadata, _ = read_lora(args.lora)
        if args.switch == "auto":
            if "switch_sigma" not in metadata:
                raise ConfigError(f"{args.lora} recommends no switch: give --switch")
            switched = Switch(sigma=metadata["switch_sigma"]).index(sigmas)
        else:
            switched = Switch.parse(args.switch).index(sigmas)
        load_lora(base, args.lora, args.strength)  # one set of weights: the adapter is off for the base, on for the tuned model
        drawn = generate(base, {"tuned": base}, prompts, [switched], settings)["tuned", switched]
    _fresh_folder(args.out, args.overwrite)
    for i, (image, prompt) in enumerate(zip(drawn, prompts)):
        path = args.out / f"{i:05d}.png"
        images.to_pil(image).save(path)
        path.with_suffix(".txt").write_text(prompt + "\n", "utf-8")
    sheet = args.out.with_name(args.out.name + "-grid.png")  # beside the folder: inside are images with prompts alone
    images.to_pil(images.grid(drawn, args.n)).save(sheet)
    (args.out / "settings.json").write_text(
        json.dumps(
            {**plain(settings), "model": args.model, "lora": str(args.lora or ""), "tuned_unet": str(unet or ""), "k": switched},
            indent=1,
        )
        + "\n",
        "utf-8",
    )
    print(
        f"wrote {len(drawn)} images to {args.out}" + (f" (base for {switched} of {settings.steps} steps)" if switched is not None else "")
    )
    return 0
