"""From the settings of a training run to its parts: loaded, checked, and on their devices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import ConfigError
from ..data import images
from ..data.buckets import bucket_sizes
from ..data.cache import TensorCache
from ..data.captions import read_captions, read_prompts
from ..data.fingerprint import Fingerprint, fingerprint
from ..data.images import ImageSource
from ..data.report import Report
from ..data.samples import Samples, check_sources, content_hash, encode_images, load_samples
from ..lora.extract import weight_files
from ..lora.file import lora_weights
from ..memory.offload import offloads, place_models, place_rewards
from ..models.diffusers_policy import DiffusersPolicy
from ..models.open import (
    DTYPES,
    denoiser_hashes,
    gradient_vae_hash,
    open_consistency,
    open_gradient_vae,
    open_policy,
    open_training_adapter,
)
from ..models.second import states_schedule, with_network
from ..rewards.base import RewardModel
from ..rewards.registry import load_features, load_reward
from ..rewards.two_tower import TwoTower
from ..rng import generator
from ..runtime.files import file_hash, files_hash
from ..runtime.processes import Processes
from ..training.config import TrainConfig
from ..training.evaluation import CHUNK, Evaluation, Reference
from ..training.parts import Parts, asks_reward, check_data, check_heldout, check_settings, weights_of

log = logging.getLogger(__name__)
REFERENCES = 500  # images at most that a watch's FID and LogCov compare with


def load_parts(config: TrainConfig, device: str, processes: Processes, *, resume: bool = False) -> Parts:
    """Load what a run is made of; `place_parts` finishes it. Raises ConfigError where settings and parts do not fit together.

    resume: a run of an earlier version may have been watched by the reward that it trains on, and goes on with a warning.
    """
    source = config.images or config.pairs or config.labels
    check_data(config)
    check_sources(config.prompts, config.images, config.pairs, config.labels)
    if config.prompts and source:
        key = next(key for key in ("images", "pairs", "labels") if getattr(config, key))
        log.warning(f"prompts = {config.prompts} is not read: with `{key}` a run trains on their captions")
    if config.buckets and source in ("", "demo"):
        raise ConfigError("buckets = true: they are for `images`, `pairs` or `labels` of your own")
    if config.watch.every and not config.watch.heldout:
        raise ConfigError("watch.every is set: name the held-out reward in watch.heldout")
    aside = "cpu" if offloads(config) else device  # encoding prompts and images needs the device's memory
    asked = asks_reward(config)
    reward = _reward(config, config.reward, aside, config.reward_dtype) if asked else None
    if reward is not None and config.gradient_checkpointing_reward:
        if not reward.supports_gradient_checkpointing:
            raise ConfigError(f"gradient_checkpointing_reward = true: {config.reward} cannot recompute its activations")
        reward.gradient_checkpointing(True)
    weights = weights_of(config)
    try:
        check_heldout(config, weights)
    except ConfigError as error:
        if not resume:
            raise
        log.warning("warning: %s", error)
    policy = open_policy(config.model, device, config.model_options, config.image_size, config.offload_encoders)
    if config.gradient_vae:
        open_gradient_vae(policy, config.gradient_vae)
    _set_speed(policy, config)
    if config.consistency:
        open_consistency(policy, config.consistency)
    if config.training_adapter:
        open_training_adapter(policy, config.training_adapter)
    features = load_features(config.features, aside) if config.features else None
    samples = _samples(config, policy, processes)
    evaluation = _evaluation(config, policy, reward, samples, aside, processes)
    parts = Parts(policy, samples, reward, features, evaluation, processes=processes)
    check_settings(config, parts)
    now, earlier = denoiser_hashes(config.model)
    data = _data(config, samples, evaluation)
    return replace(parts, base_hash=now, earlier_base_hash=earlier, weights=weights, data=data)


def _reward(config: TrainConfig, spec: str, device: str, dtype: str = "float32") -> RewardModel:
    return load_reward(spec, config.standardise, device, DTYPES[dtype], config.allow_remote)


def _data(config: TrainConfig, samples: Samples, evaluation: Evaluation | None) -> dict[str, Fingerprint]:
    """By setting that names data: what tells them from others, see Parts."""
    key = next((key for key in ("images", "pairs", "labels") if getattr(config, key)), "prompts")
    found = {key: samples.fingerprint} if samples.fingerprint else {}
    if config.consistency not in ("", "demo"):
        found["consistency"] = fingerprint(1, weights=[file_hash(lora_weights(Path(config.consistency)))])
    if config.training_adapter:
        found["training_adapter"] = fingerprint(1, weights=[file_hash(lora_weights(Path(config.training_adapter)))])
    if config.gradient_vae:
        found["gradient_vae"] = fingerprint(1, weights=[gradient_vae_hash(config.gradient_vae)])
    if config.watch.prompts and evaluation is not None:
        found["watch.prompts"] = fingerprint(len(evaluation.prompts), prompts=evaluation.prompts)
    if config.watch.every and config.watch.tuned_model:
        found["watch.tuned_model"] = fingerprint(1, weights=[files_hash(weight_files(Path(config.watch.tuned_model)))])
    if config.watch.every and config.watch.reference not in ("", "none"):
        references = _references(config)
        found["watch.reference"] = fingerprint(len(references), images=map(content_hash, references))
    return found


def place_parts(config: TrainConfig, parts: Parts, device: str) -> None:
    """Encode the prompts, and move what the training steps need to the device."""
    assert isinstance(parts.policy, DiffusersPolicy)
    evaluated = parts.evaluation.prompts if parts.evaluation else []
    parts.policy.prompts.prepare([*config.method.captions(parts.samples.texts), "", *evaluated], _cache(config), parts.processes)
    place_models(config, parts.policy, parts.evaluation, device)  # after encoding: encoders and denoiser need not fit in together
    place_rewards(config, parts, device)


def base_hash(model: str) -> str:
    """SHA-256 of the denoiser, over all its files."""
    return denoiser_hashes(model)[0]


def _cache(config: TrainConfig) -> TensorCache | None:
    return TensorCache(Path(config.cache)) if config.cache else None


def _samples(config: TrainConfig, policy: DiffusersPolicy, processes: Processes) -> Samples:
    if config.images == "demo":
        from ..demo.show import FULL
        from ..demo.world import real_images

        return encode_images(policy, *real_images(FULL.real, config.seed))
    if "demo" in (config.pairs, config.labels):
        from ..demo.pairs import rated_samples
        from ..demo.show import FULL

        return rated_samples(policy, FULL.real // 2, config.seed, labelled=not config.pairs)
    size = config.image_size or policy.image_size[-1]
    sizes = bucket_sizes(size, policy.unit) if config.buckets else ((size, size),)
    source = (config.prompts, config.images, sizes, _cache(config), processes)
    return load_samples(policy, *source, pairs=config.pairs, labels=config.labels, details=config.method.reads_details)


def _evaluation(
    config: TrainConfig, policy: DiffusersPolicy, reward: RewardModel | None, samples: Samples, device: str, processes: Processes
) -> Evaluation | None:
    """The evaluations of a run; diversity is measured in features of the held-out reward or, where it has none, of the training reward."""
    if not config.watch.every or reward is None:
        return None
    heldout = _reward(config, config.watch.heldout, device)
    towers = [r.raw for r in (heldout, reward) if isinstance(r.raw, TwoTower)]
    if not towers:
        raise ConfigError("the watch measures diversity in image features: train on a two-tower reward, or name one in watch.heldout")
    texts, photos = Report(), Report()
    prompts = read_prompts(Path(config.watch.prompts), texts) if config.watch.prompts else samples.prompts
    compared = reference(config, policy.image_size, photos)
    for report in (texts, photos):
        if report.source and processes.main:
            report.show()
    judges, features = {"reward": reward, "heldout": heldout}, towers[0].image_features
    return Evaluation.of_run(config, policy, judges, prompts, features, reference=compared, tuned=_tuned_model(config, policy))


def _tuned_model(config: TrainConfig, policy: DiffusersPolicy) -> DiffusersPolicy | None:
    """The other model of evaluations."""
    path, parts = config.watch.tuned_model, config.watch.tuned_parts
    if not path:
        return None
    try:
        if not states_schedule(policy, path, parts):
            raise ConfigError(f"{path} is a network without a schedule: give watch.tuned_parts, a diffusers folder of that model")
        model = with_network(policy, path, parts)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"watch.tuned_model: {error}") from error
    _set_speed(model, config)
    return model


def reference(config: TrainConfig, size: tuple[int, int], report: Report | None = None) -> Reference | None:
    """REFERENCES images at most of `watch.reference` or of the training images, cropped to `size`; None where there are none.

    `report` is filled for `watch.reference` alone: the training images have one of their own.
    """
    if config.watch.reference == "none" or not (config.watch.reference or config.images):
        return None
    if not config.watch.reference and config.images == "demo":
        from ..demo.show import FULL
        from ..demo.world import real_images

        return lambda: real_images(FULL.real, config.seed)[0][:REFERENCES].split(CHUNK)
    chosen = _references(config, report)
    return lambda: (
        torch.stack([images.load(source, size) for source in chosen[first : first + CHUNK]]) for first in range(0, len(chosen), CHUNK)
    )


def _references(config: TrainConfig, report: Report | None = None) -> list[ImageSource]:
    """REFERENCES images at most, in random order."""
    found: Sequence[ImageSource] = (
        images.find(Path(config.watch.reference), report)
        if config.watch.reference
        else list(dict.fromkeys(source for source, _ in read_captions(config.images)))
    )
    if len(found) < 2:
        raise ConfigError(f"watch.reference: FID and LogCov need at least two images, not {len(found)}: give a folder, or none")
    order = torch.randperm(len(found), generator=generator(config.seed, "reference"))[:REFERENCES].tolist()
    return [found[i] for i in order]


def _set_speed(policy: DiffusersPolicy, config: TrainConfig) -> None:
    """Apply the settings that change time and memory and, except for rounding, no result."""
    policy.merge_rollouts, policy.autoencoder.slicing = config.merge_rollouts, config.vae_slicing
    if config.channels_last:
        policy.use_channels_last()
    if config.compile:
        policy.compile()
