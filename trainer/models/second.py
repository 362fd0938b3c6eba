"""A second model of one family for the tuned part of combined generation: its own network and schedule, all else shared.

Its network is quantised as the first model is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .diffusers_policy import DiffusersPolicy
from .load import INDICES, load_policy, resolve
from .quantisation import has_quantised, original_shape, quantise
from .quiet import without_dtype_warning
from .single_file import load_part, one_line_errors
from .split_files import load_in_file, pipeline_settings

SCHEDULE = "scheduler_config.json"


def with_network(policy: DiffusersPolicy, path: str | Path, parts: str | Path = "", network: Any = None) -> DiffusersPolicy:
    """A policy with the network and the noise levels of another model of the family; text encoders and autoencoder are shared.

    path: a diffusers folder, its network's folder, or a single file. A folder that is part of a pipeline's brings that pipeline's
    schedule. A file of the network alone states none: `parts` is a diffusers folder that does; without one the levels are the policy's.
    network: one of the same shapes, without values, that stands for the second one in a dry run.
    Raises ValueError or FileNotFoundError with one line for another family or size.
    """
    path, folder = Path(path), Path(parts) if parts else None
    settings: dict[str, Any] = {name: policy.pipeline.config[name] for name in policy.settings}
    found: dict[str, Any] = {}
    if path.is_file():
        found = _of_file(policy, path, folder) if network is None else {}
    else:
        place = path / policy.network_name if any((path / index).is_file() for index in INDICES) else path
        if place is not path:
            _check_family(policy, resolve(path)[0], path)
        if network is None:
            found[policy.network_name] = _of_folder(policy, place)
        for name in policy.within:
            if (place.parent / name).is_dir():
                found[name] = load_part(place.parent / name, ("diffusers", type(getattr(policy.pipeline, name)).__name__), policy.dtype)
        folder = folder or place.parent
    if network is not None:
        found[policy.network_name] = network
    if folder is not None and (folder / "scheduler" / SCHEDULE).is_file():
        kind = type(policy.pipeline.scheduler).__name__
        found["scheduler"] = load_part(folder / "scheduler", ("diffusers", kind), policy.dtype)
        settings |= pipeline_settings(folder, type(policy))
    _check_architecture(policy, found[policy.network_name], path)
    kind = policy.quantisation.kind(policy.network_name)
    if kind and not has_quantised(found[policy.network_name]):
        quantise(found[policy.network_name], kind, policy.dtype)
    pipeline = policy.assemble(**{**policy.arguments, **policy.pipeline.components, **settings, **found})
    placed = next(policy.network.parameters()).device.type == policy.device.type
    made = type(policy)(pipeline, policy.device, policy.dtype, policy.image_size, policy.prompts.offload)
    made.quantisation = policy.quantisation
    if placed:  # with offloading the constructor has put what both share on the CPU
        made.to(policy.device)
    encoding = [name for name in settings if name.startswith("text_encoder")]
    shared = made.max_tokens == policy.max_tokens and not found.keys() & policy.within.keys()
    if shared and all(pipeline.config[name] == policy.pipeline.config[name] for name in encoding):
        made.prompts = policy.prompts  # each prompt is encoded once for both
    return made


def states_schedule(policy: DiffusersPolicy, path: str | Path, parts: str | Path = "") -> bool:
    """Whether the noise levels of `with_network` are those of a schedule that belongs to `path`."""
    return not (Path(path).is_file() and policy.split_files) or (Path(parts) / "scheduler" / SCHEDULE).is_file()


def _of_file(policy: DiffusersPolicy, path: Path, parts: Path | None) -> dict[str, Any]:
    """The components of a single file: its network, and the schedule where that is the architecture's."""
    family, config = resolve(path)
    _check_family(policy, family, path)
    assert config is not None
    if family.split_files:
        return load_in_file(path, family, config, policy.dtype)
    whole = load_policy(path, policy.device, policy.dtype, policy.image_size, parts=parts or "", offload=True)
    return {name: getattr(whole.pipeline, name) for name in (policy.network_name, "scheduler")}


def _of_folder(policy: DiffusersPolicy, folder: Path) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers {policy.network_name}: it has no config.json")
    with one_line_errors(file):
        name = str(json.loads(file.read_text("utf-8")).get("_class_name"))
    kind: Any = type(policy.network)
    if name != kind.__name__:
        raise ValueError(f"{folder} is of another family: it holds a {name}, the model has a {kind.__name__}")
    with without_dtype_warning(), one_line_errors(folder):
        return kind.from_pretrained(folder, torch_dtype=policy.dtype, use_safetensors=True)


def _check_family(policy: DiffusersPolicy, family: type[DiffusersPolicy], path: Path) -> None:
    if family is not type(policy):
        raise ValueError(f"{path} is of another family: it is for {family.pipeline_name}, the model for {policy.pipeline_name}")


def _check_architecture(policy: DiffusersPolicy, network: Any, path: Path) -> None:
    theirs, ours = ({name: original_shape(p) for name, p in each.named_parameters()} for each in (network, policy.network))
    ours = {name.replace(".base_layer.", "."): shape for name, shape in ours.items() if ".lora_" not in name}
    wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} is a model of another size or family: {len(wrong)} of its weights differ, {name} has shape {theirs.get(name)}, "
            f"the model's {ours.get(name)}"
        )
