"""What the tests share: a policy small enough to differentiate by hand, and tiny random pipelines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers.tokens import template_tokenizer
from helpers.toys import ToyDenoiser
from torch import nn

from trainer.models.unet import UNetPolicy
from trainer.sampling import add_noise

torch.set_num_threads(1)


class ToyPolicy:
    """D(x, σ) = (x·scale + shift)/(1 + σ²), 2×1×1 latents that are their own pixels; adapter = (scale − 1, shift)."""

    space = "ve"
    latent_shape = (3, 1, 1)
    device = torch.device("cpu")
    adapters = frozenset({"base", "tuned"})

    def __init__(self, dtype=torch.float64):
        self.weight = nn.Parameter(torch.tensor([0.1, -0.2], dtype=dtype))
        self.calls = 0

    def _denoise(self, x, sigma, weight):
        self.calls += len(x)
        return (x * (1 + weight[0]) + weight[1]) / (1 + sigma.to(x).square()).reshape(-1, 1, 1, 1)

    def denoiser(self, prompts, *, adapter="tuned", guidance_scale=1.0, negative="", prompt_weight=1.0):
        weight = self.weight if adapter == "tuned" else torch.zeros_like(self.weight)
        return ToyDenoiser(prompts, lambda x, sigma: self._denoise(x, sigma, weight))

    def merged(self):
        return contextlib.nullcontext()

    def sigmas(self, steps):
        return torch.cat([torch.linspace(4.0, 0.1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])

    def start(self, noise, steps):
        return noise.double() * 4.0

    def add_noise(self, x0, noise, sigma):
        return add_noise(x0, noise, sigma)

    def decode(self, latents):
        return latents

    def parameters(self):
        return [self.weight]


class ToyReward:
    """−‖image − target‖²: smooth, known gradient."""

    differentiable = True

    def __call__(self, images, prompts):
        return -(images - 0.3).square().flatten(1).sum(1)


@pytest.fixture
def toy_policy():
    return ToyPolicy()


@pytest.fixture
def toy_reward():
    return ToyReward()


def tiny_pipeline(tmp_path):
    """A random Stable Diffusion folder with the embedded model's architecture."""
    from diffusers import StableDiffusionPipeline

    from trainer.demo import architecture

    torch.manual_seed(0)
    architecture.write_tokenizer(tmp_path / "words")
    pipeline = StableDiffusionPipeline(
        vae=architecture.build_vae(),
        text_encoder=architecture.build_text_encoder(),
        tokenizer=architecture.load_tokenizer(tmp_path / "words"),
        unet=architecture.build_unet(),
        scheduler=architecture.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(folder).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def policy(pipeline_folder):
    return UNetPolicy.load(pipeline_folder)


@pytest.fixture
def earlier_rewards(tmp_path_factory, monkeypatch):
    """The embedded rewards of 0.1.0 in place of the shipped ones: what that version's results depend on."""
    from trainer.demo import files

    folder, earlier = tmp_path_factory.mktemp("weights"), Path(__file__).parent / "data" / "v010" / "rewards"
    for path in files.FOLDER.iterdir():
        (folder / path.name).symlink_to(earlier / path.name if (earlier / path.name).exists() else path)
    monkeypatch.setattr(files, "FOLDER", folder)


def two_tower(folder, seed):
    """A random two-tower reward in the layout that trained ones have."""
    from tools.embedded.export import write_tower
    from trainer.demo import architecture

    torch.manual_seed(seed)
    architecture.write_tokenizer(folder / "words")
    vision = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}  # a transformer, as released rewards are
    config = {**architecture.TOWERS["proxy"], "vision_cfg": vision}
    write_tower(folder / "tower", architecture.build_tower(config), config, 0.0, 1.0, folder / "words")
    return folder / "tower"


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    """A random two-tower reward."""
    return two_tower(tmp_path_factory.mktemp("reward"), 1)


@pytest.fixture(scope="session")
def heldout_folder(tmp_path_factory):
    """Another one."""
    return two_tower(tmp_path_factory.mktemp("heldout"), 2)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Eight captioned renders as files."""
    from trainer.data import images
    from trainer.demo.world import real_images

    folder = tmp_path_factory.mktemp("images")
    pictures, captions = real_images(8, 0)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        images.to_pil(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def t5_tokenizer():
    """A tokenizer of letters for tiny T5 encoders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ,")}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **letters}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def chat_tokenizer():
    """The tokenizer of letters with a chat template, for tiny Qwen3 encoders."""
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] }}, {% endfor %}assistant"
    return tokenizer


def tiny_qwen3(kind, layers=3):
    """A random Qwen3 for the tokenizer of letters."""
    from transformers import Qwen3Config

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    return kind(Qwen3Config(vocab_size=40, head_dim=16, **sizes)).eval()


def tiny_qwen_vae():
    """A random autoencoder of Qwen-Image's kind."""
    import diffusers

    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    for layer in (vae.decoder.conv_out, vae.quant_conv):
        torch.nn.init.normal_(layer.weight, std=0.2)  # an output that would show a mistake
    return vae


def tiny_krea():
    """A random Krea 2 pipeline; its attention heads are as wide as ComfyUI takes them."""
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32, "num_position_embeddings": 16}
    encoder = Qwen3VLModel(
        Qwen3VLConfig(
            text_config={**text, "vocab_size": 64, "head_dim": 16, "rope_parameters": rope},
            vision_config={**vision, "deepstack_visual_indexes": [0]},
        )
    ).eval()
    transformer = diffusers.Krea2Transformer2DModel(
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=768,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=128,
    )
    for name, weight in transformer.named_parameters():
        if "scale_shift_table" in name:
            torch.nn.init.normal_(weight, std=0.5)
        elif ".norm" in name:
            torch.nn.init.normal_(weight, std=0.1)
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)
    return diffusers.Krea2Pipeline(
        transformer=transformer,
        vae=tiny_qwen_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        text_encoder=encoder,
        tokenizer=template_tokenizer(),
        text_encoder_select_layers=(1, 2, 3),
    )


def tiny_qwen():
    """A random Qwen-Image pipeline."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**text, "vocab_size": 64, "rope_parameters": rope}, vision_config=vision)
    ).eval()
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=tiny_qwen_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shift),
        text_encoder=encoder,
        tokenizer=template_tokenizer(),
    )


def tiny_anima():
    """A random Anima pipeline: Qwen3's tokens are words, and T5's letters."""
    import diffusers
    from transformers import Qwen3Model

    text = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2}
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 8}
    transformer = diffusers.CosmosTransformer3DModel(**network, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None)
    for name, weight in transformer.named_parameters():
        if ".norm" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    pipeline = diffusers.AnimaModularPipeline()
    pipeline.update_components(
        transformer=transformer,
        vae=tiny_qwen_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=tiny_qwen3(Qwen3Model),
        tokenizer=template_tokenizer(),
        t5_tokenizer=t5_tokenizer(),
        text_conditioner=diffusers.AnimaTextConditioner(**text).eval(),
    )
    return pipeline


def tiny_family(name, words):
    """A random pipeline of the family `name`, in its true layout and as small as its classes allow; `words` is a tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from trainer.demo import architecture

    torch.manual_seed(sum(map(ord, name)))
    end = architecture.vocabulary_size() - 1

    def clip(kind):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
        tokens = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        return kind(CLIPTextConfig(**sizes, **tokens, max_position_embeddings=77)).eval()

    def t5():
        return T5EncoderModel(T5Config(vocab_size=40, d_model=64, d_kv=8, d_ff=64, num_layers=1, num_heads=2)).eval()

    def vae(channels, **kwargs):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1}
        return diffusers.AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=channels, **blocks, **kwargs)

    if name in ("krea2", "qwen-image", "anima"):
        return {"krea2": tiny_krea, "qwen-image": tiny_qwen, "anima": tiny_anima}[name]()
    if name in ("sd3", "flux-dev", "flux-schnell", "z-image", "chroma"):
        bare = {"use_quant_conv": False, "use_post_quant_conv": False}
        parts = {"vae": vae(16, scaling_factor=1.5305, shift_factor=0.0609, **bare)}
    else:
        parts = {"vae": vae(4, scaling_factor=0.13025)}
    if name == "klein":
        from transformers import Qwen3ForCausalLM

        encoder = tiny_qwen3(Qwen3ForCausalLM, layers=28)  # its conditioning is layers 9, 18 and 27
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=32,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 32,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 4, 4),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1}
        autoencoder = diffusers.AutoencoderKLFlux2(block_out_channels=(32,) * 4, latent_channels=8, **blocks)
        autoencoder.bn.running_mean.normal_(std=0.5)
        autoencoder.bn.running_var.uniform_(0.5, 2.0)
        return diffusers.Flux2KleinPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=encoder,
            tokenizer=chat_tokenizer(),
        )
    if name == "chroma":
        transformer = diffusers.ChromaTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
        torch.nn.init.normal_(transformer.distilled_guidance_layer.out_proj.weight, std=0.2)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        return diffusers.ChromaPipeline(transformer=transformer, scheduler=scheduler, text_encoder=t5(), tokenizer=t5_tokenizer(), **parts)
    if name == "z-image":
        from transformers import Qwen3Model

        sizes = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
        transformer = diffusers.ZImageTransformer2DModel(in_channels=16, **sizes, axes_dims=(4, 6, 6))
        for layer in transformer.all_final_layer.values():
            torch.nn.init.normal_(layer.linear.weight, std=0.3)  # an output that would show a mistake
        return diffusers.ZImagePipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
            text_encoder=tiny_qwen3(Qwen3Model),
            tokenizer=chat_tokenizer(),
            **parts,
        )
    tokenizers = {"tokenizer": architecture.load_tokenizer(words), "tokenizer_2": architecture.load_tokenizer(words)}
    if name == "sdxl":
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        )
        encoders = {"text_encoder": clip(CLIPTextModel), "text_encoder_2": clip(CLIPTextModelWithProjection)}
        return diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **encoders, **tokenizers, **parts, add_watermarker=False)
    if name == "sd3":
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        encoders = {"text_encoder": clip(CLIPTextModelWithProjection), "text_encoder_2": clip(CLIPTextModelWithProjection)}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        thirds = {"text_encoder_3": t5(), "tokenizer_3": t5_tokenizer()}
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)  # an output that would show a mistake
        return diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **encoders, **tokenizers, **thirds, **parts)
    dev = name == "flux-dev"
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizers["tokenizer"],
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        **parts,
    )


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, pipeline_folder):
    """A function from a family's name to the diffusers folder of a tiny random model."""
    folders = {"sd15": pipeline_folder}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            more = {"overwrite_modular_index": True} if name == "anima" else {}  # else it warns
            tiny_family(name, pipeline_folder / "tokenizer").save_pretrained(str(folders[name]), **more)
        return folders[name]

    return folder


@pytest.fixture
def consistency_lora(policy, tmp_path):
    """A random adapter of every kind of layer, as a file."""
    from tools.embedded.distil import TARGETS
    from trainer.lora.file import save_lora
    from trainer.policy import Lora

    policy.add_lora(Lora(rank=4, alpha=4.0, targets=TARGETS))
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    save_lora(policy, tmp_path / "consistency.safetensors", {})
    return tmp_path / "consistency.safetensors"
