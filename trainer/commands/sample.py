"""`python -m trainer sample`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from ..config import ConfigError, plain
from ..data import images
from ..generate import generate
from ..guidance import Switch, cfg, combined
from ..lora.file import load_lora, read_lora
from ..models.two_unets import TUNED_UNET, with_unet
from .options import add_generation, finite, generation_of, policy_of, prompts_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample`."""
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    add("--lora", type=Path, metavar="FILE", help="LoRA of the tuned model; without one the base model takes every step")
    add(
        "--tuned-unet",
        type=Path,
        metavar="FOLDER",
        help="the tuned model's UNet (default: fine_tuned_unet in the model's folder, if there)",
    )
    add(
        "--switch",
        default="auto",
        metavar="WHERE",
        help="first step of the tuned model: 15, 75%%, sigma=0.63, or auto: the LoRA's (default)",
    )
    add(
        "--until",
        metavar="WHERE",
        help="step from which the base model is back, written as --switch: `--switch 0 --until 2` (default: never)",
    )
    add("--strength", type=finite, default=1.0, metavar="X", help="strength of the LoRA (default 1)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the images")
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    add_generation(parser)


def run(args: argparse.Namespace) -> int:
    """Generate images with the base model, the tuned model, or the tuned model from the switch on; returns the exit status."""
    settings, prompts = generation_of(args), prompts_of(args)
    unet = _tuned_unet(args)
    switch, until = _switch(args, unet), _until(args, unet)
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise ConfigError(f"{args.out} exists: add --overwrite to write into it")
    policy = policy_of(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {args.out}: {error}") from error
    k, end = (where.index(policy.sigmas(settings.steps)) if where else None for where in (switch, until))
    if k is not None and end is not None and end <= k:
        raise ConfigError(f"no step lies between --switch, step {k}, and --until, step {end}")
    if args.lora is not None:
        load_lora(policy, args.lora, args.strength)
    models = {"tuned": with_unet(policy, unet)} if unet else {}
    mix = cfg(settings.base) if k is None else combined(settings.base, settings.tuned(model="tuned" if unet else ""), k, end)
    drawn = generate(policy, prompts, settings, {"": mix}, models)[""]
    if not bool(drawn.isfinite().all()):
        raise ValueError("the model gave values that are not finite, which would be black images: lower --strength, or give another LoRA")
    facts = {
        "model": args.model,
        "lora": str(args.lora or ""),
        "tuned_unet": str(unet or ""),
        "k": k,
        **({} if end is None else {"until": end}),
    }
    _write(drawn, prompts, args, {**plain(settings), **facts})
    tuned = "" if k is None else f" (tuned from step {k} to {settings.steps if end is None else end} of {settings.steps})"
    print(f"wrote {len(drawn)} images to {args.out}{tuned}")
    return 0


def _tuned_unet(args: argparse.Namespace) -> Path | None:
    """The tuned model's whole UNet: the argument's, or that of a folder in the layout of the published ImageReFL models."""
    if args.tuned_unet is not None and args.lora is not None:
        raise ConfigError("the tuned model is a LoRA or a UNet: give --lora or --tuned-unet, not both")
    published = Path(args.model) / TUNED_UNET
    return args.tuned_unet or (published if args.lora is None and published.is_dir() else None)


def _switch(args: argparse.Namespace, unet: Path | None) -> Switch | None:
    """Where the tuned model takes over; None without a tuned model."""
    if args.lora is None and unet is None:
        return None
    metadata = read_lora(args.lora)[1] if args.lora is not None else {}
    if args.switch != "auto":
        return Switch.parse(args.switch)
    if unet is not None:
        raise ConfigError(f"{unet} recommends no switch: give --switch (its authors: 75% for SD1.5, 87.5% for SDXL)")
    if not isinstance(metadata.get("switch_sigma"), int | float):
        raise ConfigError(f"{args.lora} recommends no switch: give --switch")
    return Switch(sigma=metadata["switch_sigma"])


def _until(args: argparse.Namespace, unet: Path | None) -> Switch | None:
    """Where the base model is back; None if it never is."""
    if args.until is None:
        return None
    if args.lora is None and unet is None:
        raise ConfigError("--until ends the tuned model's part: give --lora or --tuned-unet")
    return Switch.parse(args.until)


def _write(drawn: Tensor, prompts: list[str], args: argparse.Namespace, settings: dict[str, object]) -> None:
    """Write images (N,3,H,W), each with its prompt, and `settings.json` into the folder, and a contact sheet beside it."""
    for i, (image, prompt) in enumerate(zip(drawn, prompts)):
        path = args.out / f"{i:05d}.png"
        images.to_pil(image).save(path)
        path.with_suffix(".txt").write_text(prompt + "\n", "utf-8")
    folder = args.out.resolve()  # `.` has no name
    sheet = folder.with_name(folder.name + "-grid.png")  # outside: every image inside has a prompt
    images.to_pil(images.grid(drawn, args.n)).save(sheet)
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
