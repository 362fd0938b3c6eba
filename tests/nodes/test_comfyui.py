"""The embedded model and our LoRAs inside a real ComfyUI, in a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.comfyui import PLACES, comfyui, random_lora, run_inside

from trainer.lora.file import save_delta
from trainer.models.unet import UNetPolicy

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def place(request):
    return request.param


@comfyui
@pytest.mark.slow
def test_comfyuis_own_classes_give_diffusers_outputs_and_load_every_lora_key(place, pipeline_folder, tmp_path):
    lora = random_lora(pipeline_folder, tmp_path / "a.safetensors", 7, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"))
    errors = run_inside(place, "same_model.py", pipeline_folder, lora, cwd=tmp_path)
    assert errors["unmatched"] == 0
    assert max(errors["denoised"], errors["decoded"], errors["text"]) < 1e-4
    assert errors["tuned"] < 1e-3 * errors["effect"] and errors["effect"] > 0.01


@pytest.fixture(scope="module")
def exactness(place, pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exactness")
    loras = [random_lora(pipeline_folder, folder / f"{seed}.safetensors", seed) for seed in (7, 8)]
    return run_inside(place, "exactness.py", pipeline_folder, *loras, cwd=folder)


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "two", "styled"])
def test_combined_sampling_equals_two_separate_models(exactness, mode):
    """One set of weights with gated patches, two resident models, and a style LoRA below the reward LoRA."""
    assert exactness[mode] and max(exactness[mode].values()) <= 1e-5, exactness[mode]
    assert exactness["effect"] > 0.01


@comfyui
@pytest.mark.slow
def test_the_ends_are_the_stock_sampler_bit_for_bit_and_the_base_is_left_alone(exactness):
    assert exactness["ends euler"] and exactness["ends dpmpp_2m"] and exactness["base untouched"] and exactness["denoise"]
    assert exactness["mask"] and exactness["untouched by Cancel"] and exactness["untouched by a failure"]
    assert exactness["auto"] and exactness["own conditioning"] and exactness["guider"]
    assert [exactness[f"guide {name}"] for name in ("combined", "rl", "npo")] == [True] * 3  # the Two-Model Guider
    assert exactness["stock sampler"] <= 1e-6 and exactness["strength"] <= 1e-5


@comfyui
@pytest.mark.slow
def test_a_queue_of_seeds_loads_the_model_once(exactness):
    """Three runs: the second has the LoRA of the first, the third another strength."""
    assert exactness["loads"] == [1, 0, 1] and exactness["right after each load"]


@comfyui
@pytest.mark.slow
def test_tuned_guidance_of_one_skips_the_negative(exactness):
    """Two images: base steps evaluate positive and negative, tuned steps the positive alone."""
    assert exactness["evaluations"] == [4] * 5 + [2] * 3


@comfyui
@pytest.mark.slow
def test_impossible_switches_are_refused_with_a_reason(exactness):
    expected = {
        "beyond": "lies outside the 8 steps",
        "beyond, stock sampler": "lies outside the 8 steps",
        "equal": "the tuned model equals the base",
        "zero weights": "changes nothing",
        "zero strength": "changes nothing",
        "not in a module": "which ComfyUI cannot change while it samples",
        "switch as base": "the base model is a switch already",
        "switch as tuned": "the tuned model is a switch already",
        "attention patches": "patched differently (transformer_options.patches:",
        "empty": "an empty latent batch",
        "auto": "load one trained by ImageReFL with Load Reward LoRA",
        "not finite": "not finite",
        "flow": "one of base and tuned model is a flow model",
    }
    assert exactness["refused"].keys() == expected.keys()
    for name, message in expected.items():
        assert message in exactness["refused"][name], (name, exactness["refused"])


@comfyui
@pytest.mark.slow
def test_a_full_fine_tune_is_the_tuned_model_in_the_stock_loader_and_behind_the_switch(place, pipeline_folder, tmp_path):
    """Every weight and bias of the UNet differs; base first and tuned after equals two separate models."""
    policy = UNetPolicy.load(pipeline_folder)
    policy.tune_weights()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=rng))
    save_delta(policy, tmp_path / "delta.safetensors", {"switch_sigma": 1.5}, None, torch.float32)
    told = run_inside(place, "delta.py", pipeline_folder, tmp_path / "delta.safetensors", cwd=tmp_path)
    assert told["patched"] and told["unmatched"] == 0 and told["switch"] == 1.5
    assert told["denoised"] <= 1e-5 and told["effect"] > 0.01, told
    assert max(told["combined"], told["combined, stock loader"]) <= 1e-5 and told["effect on samples"] > 0.01, told
    assert "changes nothing" in told["refused"]


@comfyui
@pytest.mark.slow
def test_comfyui_registers_every_node_with_tooltips_and_a_help_page(exactness):
    assert {*exactness["registered"]} == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}, exactness["registered"]
    assert exactness["described"]


GRAPH_FAMILIES = ("flux", "sd3", "sdxl", "zimage", "klein", "krea", "qwen", "chroma", "anima")


@pytest.fixture(scope="module")
def family_gradients(place, pipeline_folder, family_folder, tmp_path_factory):
    """Tiny models of every family, at sizes that ComfyUI's classes can have."""
    from diffusers import ChromaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel

    folders = {"klein": family_folder("klein"), "krea": family_folder("krea2"), "qwen": family_folder("qwen-image")}
    folders["anima"] = family_folder("anima")
    for name, part, kind, changed in (
        ("flux-dev", None, None, {}),
        (
            "sd3",
            "transformer",
            SD3Transformer2DModel,
            {"attention_head_dim": 64, "caption_projection_dim": 128, "dual_attention_layers": ()},
        ),
        (
            "sdxl",
            "unet",
            UNet2DConditionModel,
            {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 32, "attention_head_dim": (1, 1)},
        ),
        ("chroma", "transformer", ChromaTransformer2DModel, {"num_layers": 19, "num_single_layers": 38}),  # as ComfyUI's class has
        ("z-image", "transformer", ZImageTransformer2DModel, {"dim": 1024, "n_layers": 1, "n_heads": 64, "n_kv_heads": 64}),
    ):
        folder = family_folder(name)
        if part:
            folder = shutil.copytree(folder, tmp_path_factory.mktemp("sized") / name)
            torch.manual_seed(5)
            network = kind.from_config({**kind.load_config(folder / part), **changed})
            for token in ("x_pad_token", "cap_pad_token"):  # Z-Image's, zero at first
                if hasattr(network, token):
                    torch.nn.init.normal_(getattr(network, token))
            network.save_pretrained(folder / part)
        folders[name.removesuffix("-dev").replace("-", "")] = folder
    given = [f"{family}={folder}" for family, folder in folders.items()]
    return run_inside(place, "family_gradients.py", pipeline_folder, *given, cwd=tmp_path_factory.mktemp("gradients"))


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("family", GRAPH_FAMILIES)
@pytest.mark.parametrize("kept", ["kept", "recomputed"])
def test_training_tiny_families_in_a_graph_has_the_headless_gradient(family_gradients, family, kept):
    """ComfyUI's blocks add residuals in place; bfloat16 is as far from float32 as it is headless."""
    if f"{family}, headless bfloat16" not in family_gradients:
        pytest.skip(f"this ComfyUI has no {family}")
    single, half = (family_gradients[f"{family}, {dtype}, {kept}"] for dtype in ("float32", "bfloat16"))
    assert single < 1e-4 and half < 2 * family_gradients[f"{family}, headless bfloat16"] + 0.01, family_gradients


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "klein", "krea"])
def test_base_to_turbo_equals_two_stock_samplers_in_a_chain(family_gradients, family):
    if f"{family}, base to turbo" not in family_gradients:
        pytest.skip(f"this ComfyUI has no {family}")
    error, effect = family_gradients[f"{family}, base to turbo"]
    assert error < 1e-5 and effect > 1e-2


@comfyui
@pytest.mark.slow
def test_a_video_autoencoder_decodes_one_frame_as_headless(family_gradients):
    """Image, gradient and encoded latents, for one set of weights in both hosts."""
    if "decoded" not in family_gradients:
        pytest.skip("this ComfyUI has no Qwen-Image")
    assert max(family_gradients["decoded"]) < 1e-4, family_gradients


@comfyui
@pytest.mark.slow
def test_zero_terminal_snr_is_drawn_as_comfyui_draws_it(family_gradients):
    """v-prediction SDXL: the table of levels, the grid, the x0-prediction at the last timestep, and where ComfyUI's Euler sampler ends."""
    found = family_gradients["zero snr"]
    assert found["levels"] < 3e-5 and found["grid"] < 3e-5 and found["first"] < 1e-4 and found["end"] < 1e-4, found


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("family", GRAPH_FAMILIES)
def test_the_stock_loader_takes_a_headless_lora_of_every_family(family_gradients, family):
    """Every key, and the same x0: error as a share of what the LoRA changes."""
    if f"{family}, loaded" not in family_gradients:
        pytest.skip(f"this ComfyUI has no {family}")
    found = family_gradients[f"{family}, loaded"]
    assert found["unknown"] == [] and found["error"] < 1e-3, found


@pytest.fixture(scope="module")
def guards(place, tmp_path_factory):
    return run_inside(place, "training_guards.py", cwd=tmp_path_factory.mktemp("guards"))


@comfyui
@pytest.mark.slow
def test_training_on_a_switch_or_with_nothing_to_recompute_is_refused(guards):
    assert "model comes from a Base→Tuned Switch or a LoRA in a range: connect the model that goes into" in guards["a switch"]
    assert "no block of Sequential can be recomputed: switch gradient_checkpointing off" in guards["no block"]


@comfyui
@pytest.mark.slow
def test_what_a_sampler_heeds_and_training_does_not_is_refused_or_reported(guards):
    """A ControlNet, an area or a range of steps in a conditioning; a model's patches around its network."""
    told = {key: said for key, said in guards.items() if key.startswith("conditioning: ")}
    assert told.pop("conditioning: plain") == told.pop("conditioning: start_percent") == ""
    assert len(told) == 3
    for key, said in told.items():
        assert said == f"the conditioning has {key.split(': ')[1]}, which training does not heed: connect a plain prompt"
    assert (
        guards["patches"][0] == ""
        and "network (sampler_cfg_function: guidance, density, caching) count in sampling and not in" in guards["patches"][1]
    )


@comfyui
@pytest.mark.slow
def test_kernels_without_a_gradient_are_off_while_training_and_on_again_after_it(guards):
    """The flag of ComfyUI's own trainer; before, inside, after, after an exception, after Cancel, and where it was set already."""
    assert guards["in_training"] == [False, True, False, False, False, True]


@comfyui
@pytest.mark.slow
def test_models_in_dynamic_vram_are_copied_out_of_it_or_refused(guards):
    """Their layers share buffers, which autograd would save: model, VAE and the VAE for gradients get weights of their own."""
    assert guards["dynamic after"] == [False, False, False] and guards["own weights"] == [True, True, True]
    assert guards["types of the VAEs"] == ["torch.float32"]  # that they compute in, not that of their file
    assert guards["shared where it is not dynamic"] is True
    assert "cannot leave dynamic VRAM, as training needs: load it with a loader of ComfyUI's own" in guards["no copy"]
    assert guards["partly loaded"] == "" or "is not whole on" in guards["partly loaded"]


@comfyui
@pytest.mark.slow
def test_models_that_are_moved_while_training_train_and_draw_as_before(guards):
    """As on a GPU: a parameter made in inference mode and moved outside of it has no version counter, and no layer takes it."""
    assert guards["gradient"] > 0 and guards["moved as elsewhere"] is True
    assert guards["off after training"] == 0 and guards["scores off"] == 0


@comfyui
@pytest.mark.slow
def test_without_vram_training_is_refused_before_a_weight_is_replaced_and_rewards_are_whole(guards):
    if guards["not whole"]:  # older versions train on such weights
        assert "is not whole on meta" in guards["not whole"] and guards["weights left alone"] is True
    assert guards["where the reward is"] == ["meta"]


@pytest.fixture(scope="module")
def graph(place, tmp_path_factory):
    return run_inside(place, "graph.py", cwd=tmp_path_factory.mktemp("graph"))


@comfyui
@pytest.mark.slow
def test_reward_nodes_score_combine_pick_and_save(graph):
    claims = ["z is raw on the stored scale", "a prompt per image", "combined", "gold has no gradient", "best first, ties in order"]
    for claim in [*claims, "matching latents", "matching images", "score in the file"]:
        assert graph[claim] is True, claim


@comfyui
@pytest.mark.slow
def test_training_in_a_graph_shows_progress_and_gives_a_lora_that_every_loader_takes(graph):
    assert graph["progress"][:5] == [0, 1, 2, 3, 4] and graph["previews"] == 3
    assert graph["losses"] == 4 and graph["curves"][0] == 1 and graph["preview"] == [8, 64, 64, 3] and "4 steps" in graph["report"]
    assert graph["file equals MODEL"] and graph["saved file equals MODEL"] and graph["LoRA has an effect"] and graph["unmatched"] == 0
    assert graph["ReFL without images or clip"] == 4


@comfyui
@pytest.mark.slow
def test_cancel_saves_within_a_step_and_resuming_equals_an_uninterrupted_run(graph):
    assert graph["cancelled after"] == 2 and set(graph["resumable"]) == {"cut", "whole"}
    assert graph["resumed equals uninterrupted"] and graph["resumed losses"] == 4
    assert graph["the last run of a name"] == "cut" and graph["a seed of its own"] == 0
    kinds = ["BlackBoxSQDF", "DRTune", "DRaFTLV", "FlowBPLagrange", "SQDF", "SRPO"]
    assert graph["only finished or cancelled runs on disk"] == sorted(["broken", "cut", "refl", "whole", *kinds])


@comfyui
@pytest.mark.slow
def test_every_kind_of_objective_trains_in_a_graph(graph):
    for kind in ("DRaFTLV", "DRTune", "SRPO", "SQDF", "FlowBPLagrange", "BlackBoxSQDF"):
        assert graph[f"steps of {kind}"] == 2, kind
    assert graph["base untouched by every objective"]


@comfyui
@pytest.mark.slow
def test_training_cancel_and_failures_leave_the_host_as_it_was(graph):
    assert graph["base untouched"] and graph["base untouched by Cancel"] and graph["base untouched by failures"]
    assert graph["nothing left on the host"] and graph["nothing left on the host by failures"]
    assert graph["a model is known while a LoRA is loaded on a clone"] and graph["and the LoRA was loaded"]


@comfyui
@pytest.mark.slow
def test_judging_nodes_find_equal_images_equal(graph):
    assert abs(graph["diversity of equal images"]) < 1e-6 and max(map(abs, graph["distance to itself"])) < 0.01


@comfyui
@pytest.mark.slow
def test_bad_input_in_a_graph_gets_a_sentence(graph):
    expected = {
        "prompts ≠ images": "2 prompts for 3 images",
        "empty batch": "an empty image batch",
        "not finite": "no image is finite",
        "missing reward": "unknown reward 'no-such'",
        "missing weights": "rewards download hpsv2.1",
        "no gradient": "has no gradient",
        "no images": "connect some",
        "zero images": "an empty image batch",
        "one image": "two",
        "LoRA without effect": "changes nothing",
        "LoRA of another size": "wider.safetensors is for another size of this model: diffusion_model.",
        "broken reward": "the reward broke",
        "captions ≠ images": "2 prompts for 8 images",
        "no prompt": "write one per line",
        "no clip": "connect a clip",
        "no such module": "nothing to train",
        "changed settings": "another learning_rate",
        "no run of this name": "no run named 'never' to resume: choose one of ",
        "below the threshold": "the best score is 2",
        "broken LoRA": "not a readable safetensors",
    }
    assert graph["refused"].keys() == expected.keys()
    for name, message in expected.items():
        assert message in graph["refused"][name], (name, graph["refused"][name])


@pytest.fixture(scope="module")
def families(place, tmp_path_factory):
    return run_inside(place, "families.py", cwd=tmp_path_factory.mktemp("families"))


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd3", "control"])
def test_combined_sampling_is_exact_on_stock_loaded_families_and_with_a_controlnet(families, family):
    """A 16 M UNet of the SD1.5 class, a 2 M flow transformer of the SD3 class; both weight-sharing modes."""
    assert families[family] and families[f"{family}, unmatched"] == 0
    assert max([*families[family].values(), *families[f"{family}, two"].values()]) <= 1e-5, families
    assert all(families[f"{family}, ends"]) and families[f"{family}, effect"] > 0.01 and families["control matters"] > 0.01


@comfyui
@pytest.mark.slow
def test_models_of_other_families_are_refused_with_a_reason(families):
    assert "different latent formats (SD15, SD3)" in families["refused"]["SD3"]
    assert "different families: context_dim is 768 and 128" in families["refused"]["embedded"]


@pytest.fixture(scope="module")
def executor(place, tmp_path_factory):
    return run_inside(place, "executor.py", cwd=tmp_path_factory.mktemp("executor"))


@comfyui
@pytest.mark.slow
def test_workflows_run_through_the_executor_and_a_failure_leaves_it_well(executor):
    demos = ("base-to-few-steps", "collapse-and-cure", "reward-search", "score-and-pick-best", "trade-off-sweep")
    demos += ("two-model-guidance", "optimise-noise", "train-on-preferences")
    for name in ("combined", "again", "everything cached", *(f"demo-{demo}" for demo in demos)):
        assert executor[name] is True, (name, executor)
    assert executor["a wrong k fails"] and "lies outside the 20 steps" in executor["says why"] and executor["and the next runs"]


@comfyui
@pytest.mark.slow
def test_a_taste_waits_for_choices_then_it_is_fitted_asked_about_and_scores(executor):
    ran, said = executor["a taste without choices waits"]
    assert ran and "0 choices so far, 8 are needed, 30 are better: choose in Collect Preferences, then queue again" in said
    assert executor["its questions"] == 1 and executor["a taste of choices"] == [True, None], executor
    report = next(text for text in executor["what it says"] if "12 choices under 12 prompts" in text)
    assert "predicts 1.00 [" in report and "demo-proxy alone" in report
    assert any("bits: image" in text for text in executor["what it says"])
    assert executor["asked images"] == 4 and executor["written"] == ["demo.safetensors"]
    assert "two Fit Taste nodes of this graph write demo: give each a name of its own" in executor["two of one name"]


@comfyui
@pytest.mark.slow
def test_likes_reach_objectives_on_likes_and_no_others(executor):
    said, labels, refused = executor["likes"]
    assert said.startswith("5 liked of 8 images, for Diffusion-KTO") and labels == [-1, 1, 1, -1, 1, 1, -1, 1]
    assert "these are likes and dislikes, not pairs: train Diffusion-KTO on them" in refused


@comfyui
@pytest.mark.slow
def test_workflows_for_stable_diffusion_are_valid_once_their_files_are_there(executor):
    assert executor["refused without their files"]
    older = ["sd15-combined-lora", "sd15-preview-base-tuned-combined", "sd15-train-imagerefl", "sd15-two-checkpoints"]
    newer = ["flux2-klein-base-to-distilled", "krea2-raw-to-turbo", "z-image-base-to-turbo"]  # the first two need nodes of 2026
    older += ["sdxl-base-to-dmd2", "sdxl-combined-lora", "sdxl-reward-search", "sdxl-two-model-guidance"]
    assert executor["valid with their files"] == sorted({*older, *newer} - {*executor["too new"]}), executor
    assert executor["too new"] in ([], newer[:2])


@comfyui
@pytest.mark.slow
def test_after_cancel_and_failures_the_stock_sampler_is_bit_identical_to_a_fresh_process(graph, executor):
    assert graph["plain sample after all"] == executor["plain sample in a fresh process"]


@comfyui
@pytest.mark.slow
def test_loading_the_pack_imports_nothing_heavy(executor):
    """What ComfyUI imports anyway costs nothing more; the rest is imported where it is used."""
    heavy = {"accelerate", "diffusers", "jinja2", "lpips", "matplotlib", "open_clip", "pandas", "peft", "scipy", "sklearn", "timm"}
    heavy |= {"torch_fidelity", "torchmetrics", "torchvision", "tqdm", "transformers", "wandb"}
    assert executor["modules that the pack brings"] and not heavy & set(executor["modules that the pack brings"])


@comfyui
@pytest.mark.slow
def test_a_live_server_runs_every_workflow_and_survives_cancel_errors_and_a_hundred_prompts(place, tmp_path):
    told = run_inside(place, "live.py", cwd=tmp_path)
    for claim in (
        "every workflow is a template",
        "help page",
        "progress",
        "previews",
        "lora saved with its switch",
        "scores drawn on the node",
    ):
        assert told[claim] is True, (claim, told)
    demos = ("two-checkpoints", "collapse-and-cure", "reward-search", "score-and-pick-best", "train-imagerefl", "trade-off-sweep")
    demos += ("two-model-guidance", "optimise-noise", "train-on-preferences", "train-on-your-taste")
    for name in ("combined", *(f"demo-{demo}" for demo in demos)):
        assert told[name] == "execution_success", (name, told)
    assert told["cancel"] == "execution_interrupted" and told["state saved"] and told["resume offers it"], told
    assert told["resumed"] == told["used"] == "execution_success" and told["steps logged"] == list(range(1, 21)), told
    assert told["saved with scores"] >= 4 and told["switch drawn on the node"] == "tuned from step 13 of 20", told  # of ComfyUI's grid
    assert told["red node"][0] == "ImageReFLCombinedKSampler" and "lies outside the 20 steps" in told["red node"][1]
    assert told["refused before it runs"] and told["same picture after all that"], told
    assert told["MB grown between prompt 20 and 100"] <= 30, told
