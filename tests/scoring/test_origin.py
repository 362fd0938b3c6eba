"""Prompt, seed and model of the images that reach a node, from graphs as ComfyUI's API has them."""

from __future__ import annotations

import pytest

from trainer.scoring.origin import origin


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph():
    """Checkpoint, two LoRAs, one sampler, decoded images at the node `taste`; a second branch that does not reach it."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "2": node("LoraLoader", lora_name="style.safetensors", strength_model=1.0, model=["1", 0], clip=["1", 1]),
        "3": node("LoraLoaderModelOnly", lora_name="own.safetensors", strength_model=1.0, model=["2", 0]),
        "4": node("CLIPTextEncode", text="a cat on a chair", clip=["2", 1]),
        "5": node("CLIPTextEncode", text="blurry", clip=["2", 1]),
        "6": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "7": node("KSampler", seed=42, steps=2, denoise=1.0, model=["3", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0]),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "taste": node("ImageReFLTaste", images=["8", 0], name="taste"),
        "9": node("CLIPTextEncode", text="another prompt", clip=["1", 1]),
        "10": node("KSampler", seed=1, denoise=1.0, model=["1", 0], positive=["9", 0], negative=["5", 0], latent_image=["6", 0]),
        "11": node("SaveImage", images=["10", 0]),
    }


def test_of_one_sampler(graph):
    found = origin(graph, "taste")
    assert (found.prompt, found.seed, found.unclear) == ("a cat on a chair", 42, "")
    assert found.model == "sd15.safetensors + style.safetensors + own.safetensors"


def test_of_a_sampler_with_parts(graph):
    graph["6b"] = node("RandomNoise", noise_seed=["6c", 0])
    graph["6c"] = node("PrimitiveInt", value=7)
    graph["6d"] = node("UNETLoader", unet_name="klein.safetensors")
    graph["6e"] = node("BasicGuider", model=["6d", 0], conditioning=["4", 0])
    graph["7"] = node("SamplerCustomAdvanced", noise=["6b", 0], guider=["6e", 0], latent_image=["6", 0])
    found = origin(graph, "taste")
    assert (found.prompt, found.seed, found.model) == ("a cat on a chair", 7, "klein.safetensors")


def test_of_combined_generation(graph):
    inputs = {**graph["7"]["inputs"], "base": ["1", 0], "tuned": ["3", 0]}
    graph["7"] = node("ImageReFLCombinedKSampler", **{key: value for key, value in inputs.items() if key != "model"})
    assert origin(graph, "taste").model == "sd15.safetensors + style.safetensors + own.safetensors"


def test_what_the_graph_does_not_tell_is_none(graph):
    graph["8"] = node("LoadImage", image="a.png")
    found = origin(graph, "taste")
    assert (found.prompt, found.seed, found.model) == (None, None, None) and "no sampler" in found.unclear
    assert origin({}, "taste").prompt is None


def test_what_two_samplers_say_differently_is_none(graph):
    graph["8"] = node("ImageBatch", image1=["7b", 0], image2=["10b", 0])
    graph["7b"], graph["10b"] = (node("VAEDecode", samples=[name, 0], vae=["1", 2]) for name in ("7", "10"))
    found = origin(graph, "taste")
    assert (found.prompt, found.seed, found.model) == (None, None, None) and "different prompts" in found.unclear


def test_a_seed_that_is_computed_or_runs_in_a_circle_is_none(graph):
    for link in (["20", 0], ["7", 0]):
        graph["20"] = node("Computed", a=1.5, b=["21", 0])
        graph["21"] = node("Computed", b=["20", 0])
        graph["7"]["inputs"]["seed"] = link
        assert origin(graph, "taste").seed is None
