"""Networks in diffusers' names as their authors named them, which ComfyUI keeps."""

_KREA = {
    "img_in.": "first.",
    "time_embed.linear_1.": "tmlp.0.",
    "time_embed.linear_2.": "tmlp.2.",
    "time_mod_proj.": "tproj.1.",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "txt_in.linear_1.": "txtmlp.1.",
    "txt_in.linear_2.": "txtmlp.3.",
    "final_layer.linear.": "last.linear.",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.scale_shift_table": "last.modulation.lin",
    "text_fusion.": "txtfusion.",
    "transformer_blocks.": "blocks.",
    ".attn.to_q.": ".attn.wq.",
    ".attn.to_k.": ".attn.wk.",
    ".attn.to_v.": ".attn.wv.",
    ".attn.to_out.0.": ".attn.wo.",
    ".attn.to_gate.": ".attn.gate.",
    ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
    ".attn.norm_k.weight": ".attn.qknorm.knorm.scale",
    ".ff.": ".mlp.",
    ".norm1.weight": ".prenorm.scale",
    ".norm2.weight": ".postnorm.scale",
}


def original_anima(network, conditioner):
    """Anima's, of its network and its text conditioner: one file holds both."""
    inner = {
        **{"norm1": "adaln_modulation_self_attn", "norm2": "adaln_modulation_cross_attn", "norm3": "adaln_modulation_mlp"},
        **{
            "attn1.to_out.0": "self_attn.output_proj",
            "attn2.to_out.0": "cross_attn.output_proj",
            "attn1": "self_attn",
            "attn2": "cross_attn",
        },
        **{".linear_": ".", "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "norm_q": "q_norm", "norm_k": "k_norm"},
        **{"ff.net.0.proj": "mlp.layer1", "ff.net.2": "mlp.layer2", "transformer_blocks.": "blocks."},
    }
    ends = {"patch_embed.proj": "x_embedder.proj.1", "time_embed.t_embedder": "t_embedder.1", "time_embed.norm": "t_embedding_norm"}
    ends |= {"norm_out.linear_": "final_layer.adaln_modulation.", "proj_out": "final_layer.linear"}
    found = {f"llm_adapter.{key}": value for key, value in conditioner.items()}
    for key, value in network.items():
        for here, there in (inner if key.startswith("transformer_blocks.") else ends).items():
            key = key.replace(here, there)
        found[key] = value
    return found


def original_krea(state):
    """Krea 2's; a block's six modulations are one vector."""
    found = {}
    for key, value in state.items():
        if key.startswith("transformer_blocks.") and key.endswith(".scale_shift_table"):
            found[key.replace("transformer_blocks.", "blocks.").replace("scale_shift_table", "mod.lin")] = value.flatten()
            continue
        for here, there in _KREA.items():
            key = key.replace(here, there)
        found[key] = value
    return found


def original_vae(state):
    """An AutoencoderKL's, whose attention is 1×1 convolutions; in FLUX.2's, those at the ends lie inside encoder and decoder."""
    names = {"mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "mid_block.attentions.0.group_norm": "mid.attn_1.norm"}
    names |= {f"mid_block.attentions.0.to_{c}": f"mid.attn_1.{c}" for c in "qkv"}
    names |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "conv_norm_out": "norm_out"}
    for i in range(4):
        names |= {f"down_blocks.{i}.resnets": f"down.{i}.block", f"down_blocks.{i}.downsamplers.0": f"down.{i}.downsample"}
        names |= {f"up_blocks.{i}.resnets": f"up.{3 - i}.block", f"up_blocks.{i}.upsamplers.0": f"up.{3 - i}.upsample"}
    found = {}
    for key, value in state.items():
        side, _, rest = key.partition(".")
        old = next((o for o in names if rest.startswith(o + ".")), None)
        renamed = rest.replace(old, names[old], 1) if old else rest
        if side.endswith("quant_conv") or side == "bn":
            renamed = rest
        if ".attn_1." in f".{renamed}" and value.ndim == 2:
            value = value[:, :, None, None]
        found[f"{side}.{renamed.replace('conv_shortcut', 'nin_shortcut')}"] = value
    inside = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."} if "bn.running_mean" in state else {}
    return {next((there + k[len(here) :] for here, there in inside.items() if k.startswith(here)), k): v for k, v in found.items()}


_WAN = {"norm1.": "residual.0.", "conv1.": "residual.2.", "norm2.": "residual.3.", "conv2.": "residual.6.", "conv_shortcut.": "shortcut."}
_WAN_ENDS = {"conv_in.": "conv1.", "norm_out.": "head.0.", "conv_out.": "head.2."}


def original_wan_vae(state):
    """Of the autoencoder of Wan 2.1 and Qwen-Image, with two residual blocks to a level of the encoder and three to one of the decoder."""

    def renamed(tail, names):
        here = next((here for here in names if tail.startswith(here)), "")
        return names[here] + tail[len(here) :] if here else tail

    def name(key):
        side, kind, *rest = key.split(".")
        if side in ("quant_conv", "post_quant_conv"):
            return f"{'conv1' if side == 'quant_conv' else 'conv2'}.{kind}"
        if kind == "mid_block":
            place = "middle.1" if rest[0] == "attentions" else f"middle.{2 * int(rest[1])}"
            return f"{side}.{place}.{renamed('.'.join(rest[2:]), _WAN)}"
        if kind == "down_blocks":
            return f"{side}.downsamples.{rest[0]}.{renamed('.'.join(rest[1:]), _WAN)}"
        if kind == "up_blocks":
            index = 4 * int(rest[0]) + (int(rest[2]) if rest[1] == "resnets" else 3)
            return f"{side}.upsamples.{index}.{renamed('.'.join(rest[3:]), _WAN)}"
        return f"{side}.{renamed('.'.join([kind, *rest]), _WAN_ENDS)}"

    return {name(key): value for key, value in state.items()}


def original_text_encoder(state):
    """Of the files in ComfyUI's `text_encoders`: Qwen's, or T5's with one embedding."""
    if "shared.weight" in state:
        return {key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"}
    if any(key.startswith("model.language_model.") for key in state):  # Qwen2.5-VL's older names
        old = {"model.language_model.": "model.", "model.visual.": "visual."}
        return {next((b + key[len(a) :] for a, b in old.items() if key.startswith(a)), key): value for key, value in state.items()}
    return {key if key.startswith("model.") else f"model.{key}": value for key, value in state.items() if key != "lm_head.weight"}
