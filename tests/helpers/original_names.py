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
