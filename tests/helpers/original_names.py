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
