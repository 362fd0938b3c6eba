"""The prompt of a ComfyUI graph is the one of the sampler that made the image, or none, with the reason."""

from __future__ import annotations

import pytest

from trainer.scoring.graph import UnclearPrompt, graph_prompt


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


STAR, RING = node("CLIPTextEncode", text="a star", clip=["90", 1]), node("CLIPTextEncode", text="a ring", clip=["90", 1])
NEGATIVE = node("CLIPTextEncode", text="ugly", clip=["90", 1])


def sampler(positive="6", latent="5", denoise=1.0, kind="KSampler", **inputs):
    return node(
        kind,
        model=["90", 0],
        positive=[positive, 0],
        negative=["7", 0],
        latent_image=[latent, 0],
        seed=1,
        steps=20,
        cfg=7.0,
        denoise=denoise,
        **inputs,
    )


def graph(save="8", **nodes):
    """A text-to-image graph; `n6` replaces node 6, the positive prompt."""
    base = {
        "90": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
        "7": NEGATIVE,
        "6": STAR,
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "3": sampler(),
        "8": node("VAEDecode", samples=["3", 0], vae=["90", 2]),
        "9": node("SaveImage", images=[save, 0], filename_prefix="ComfyUI"),
    }
    return {**base, **{name.removeprefix("n"): value for name, value in nodes.items()}}


def text(**nodes):
    """A graph whose encoder reads node 10."""
    return graph(n6=node("CLIPTextEncode", text=["10", 0], clip=["90", 1]), **nodes)


ADVANCED = node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0], latent_image=["5", 0])
FLUX = node("CLIPTextEncodeFlux", clip=["90", 1], clip_l="star", t5xxl="a large star over a lake", guidance=3.5)
MADE = {
    "plain": graph(),
    "the negative prompt's node first": {"7": NEGATIVE, **graph()},
    "BasicGuider": graph(
        n3=ADVANCED, n21=node("BasicGuider", model=["90", 0], conditioning=["24", 0]), n24=node("FluxGuidance", conditioning=["6", 0])
    ),
    "CFGGuider": graph(n3=ADVANCED, n21=node("CFGGuider", model=["90", 0], positive=["6", 0], negative=["7", 0], cfg=5.0)),
    "DualCFGGuider": graph(
        n3=ADVANCED, n21=node("DualCFGGuider", cond1=["6", 0], cond2=["24", 0], negative=["7", 0]), n24=node("CLIPTextEncode", text="")
    ),
    "a second pass": graph(
        save="32",
        n30=node("LatentUpscale", samples=["3", 0]),
        n31=sampler("33", "30", 0.5),
        n32=node("VAEDecode", samples=["31", 0]),
        n33=RING,
    ),
    "a second pass from noise": graph(
        save="32", n31=sampler("6", "3"), n3=sampler("33"), n32=node("VAEDecode", samples=["31", 0]), n33=RING
    ),
    "base and refiner": graph(
        n3=node(
            "KSamplerAdvanced",
            positive=["33", 0],
            negative=["7", 0],
            latent_image=["30", 0],
            add_noise="disable",
            noise_seed=1,
            start_at_step=20,
        ),
        n30=node(
            "KSamplerAdvanced",
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
            add_noise="enable",
            noise_seed=1,
            start_at_step=0,
        ),
        n33=RING,
    ),
    "a detailer": graph(
        save="30", n30=node("FaceDetailer", image=["8", 0], positive=["33", 0], negative=["7", 0], denoise=1.0, seed=1, steps=20), n33=RING
    ),
    "two saved images, one of another sampler": graph(
        n40=sampler("41"),
        n41=RING,
        n42=node("VAEDecode", samples=["40", 0]),
        n43=node("SaveImage", images=["42", 0], filename_prefix="x/other"),
    ),
    "a preview of another sampler": graph(
        n40=sampler("41"), n41=RING, n42=node("VAEDecode", samples=["40", 0]), n43=node("PreviewImage", images=["42", 0])
    ),
    "a sampler that nothing uses": {"0": sampler("41"), "41": RING, **graph()},
    "ControlNet": graph(
        n3=sampler("30"), n30=node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["31", 0], image=["32", 0])
    ),
    "the wrong output of ControlNet": graph(
        n3={"class_type": "KSampler", "inputs": {**sampler()["inputs"], "positive": ["30", 1]}},
        n30=node("ControlNetApplyAdvanced", positive=["7", 0], negative=["6", 0]),
    ),
    "timestep ranges over a zeroed part": graph(
        n3=sampler("30"),
        n30=node("ConditioningCombine", conditioning_1=["31", 0], conditioning_2=["32", 0]),
        n31=node("ConditioningSetTimestepRange", conditioning=["6", 0], start=0.0, end=0.5),
        n32=node("ConditioningZeroOut", conditioning=["33", 0]),
        n33=RING,
    ),
    "the same prompt combined": graph(
        n3=sampler("30"),
        n30=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["31", 0]),
        n31=node("ConditioningSetArea", conditioning=["6", 0]),
    ),
    "SDXL's texts, equal": graph(n6=node("CLIPTextEncodeSDXL", text_g="a star", text_l="a  star", width=64, clip=["90", 1])),
    "SDXL's texts, one empty": graph(n6=node("CLIPTextEncodeSDXL", text_g="", text_l="a star", clip=["90", 1])),
    "Reroute": text(n10=node("Reroute", **{"": ["11", 0]}), n11=node("PrimitiveStringMultiline", value=" a star ")),
    "a switch of texts": text(
        n10=node("ComfySwitchNode", switch=True, on_false=["11", 0], on_true=["12", 0]),
        n11=node("PrimitiveString", value="a ring"),
        n12=node("PrimitiveString", value="a star"),
    ),
    "a numbered switch": text(n10=node("CR Text Input Switch", Input=2, text1="a ring", text2="a star")),
    "Impact's switch": text(
        n10=node("ImpactSwitch", select=2, sel_mode=False, input1=["11", 0], input2=["12", 0]),
        n11=node("Text", text="a ring"),
        n12=node("Text", text="a star"),
    ),
    "any switch": text(
        n10=node("Any Switch (rgthree)", any_02=["11", 0], any_03=["12", 0]),
        n11=node("Text", text="a star"),
        n12=node("Text", text="a ring"),
    ),
    "a switch of conditionings": graph(
        n3=sampler("30"), n30=node("ComfySwitchNode", switch=False, on_false=["6", 0], on_true=["31", 0]), n31=RING
    ),
    "a populated wildcard": text(
        n10=node("ImpactWildcardProcessor", wildcard_text="a {star|ring}", populated_text="a star", mode="populate", seed=1)
    ),
    "a styler": text(n10=node("SDXLPromptStyler", text_positive="a star", text_negative="ugly", style="base", log_prompt="No")),
    "text shown on its way": text(
        n10=node("ShowText|pysssss", text=["11", 0], text_0="of an earlier run"), n11=node("String Literal", string="a star")
    ),
    "Efficient Loader": graph(
        n3=node(
            "KSampler (Efficient)", model=["30", 0], positive=["30", 1], negative=["30", 2], latent_image=["30", 3], seed=1, denoise=1.0
        ),
        n30=node("Efficient Loader", ckpt_name="x", positive="a star", negative="ugly", lora_name="None"),
    ),
    "a pipe": graph(
        n3=node("easy kSampler", pipe=["30", 0], image_output="Hide"),
        n30=node("easy preSampling", pipe=["31", 0], steps=20, denoise=1.0, seed=1),
        n31=node("easy fullLoader", ckpt_name="x", positive="a star", negative="ugly"),
    ),
    "a basic pipe": graph(
        n3=sampler("30"),
        n30=node("FromBasicPipe", basic_pipe=["31", 0]),
        n31=node("ToBasicPipe", model=["90", 0], positive=["6", 0], negative=["7", 0]),
    ),
    "CaseConverter, StringTrim and StringReplace": text(
        n10=node("CaseConverter", string=["11", 0], mode="lowercase"),
        n11=node("StringTrim", string=["12", 0], mode="Both"),
        n12=node("StringReplace", string="A RING", find="RING", replace="STAR "),
    ),
}
OTHER = {
    "a large star over a lake": graph(n6=FLUX),
    "a star, crisp": text(
        n10=node("StringConcatenate", string_a="a star", string_b=["11", 0], delimiter=", "), n11=node("PrimitiveString", value="crisp")
    ),
    "a star and crisp": text(
        n10=node("JoinStringMulti", inputcount=2, string_1="a star", string_2="crisp", delimiter=" and ", return_list=False)
    ),
    "a star|crisp": text(
        n10=node("Text Concatenate", delimiter="|", clean_whitespace="true", text_b="crisp", text_a=["11", 0], text_c=""),
        n11=node("Text Multiline", text="a star"),
    ),
    "a star, a ring": graph(
        n3=sampler("30"), n30=node("ConditioningConcat", conditioning_from=["31", 0], conditioning_to=["6", 0]), n31=RING
    ),
}


@pytest.mark.parametrize("what", MADE)
def test_the_prompt_is_that_of_the_sampler_that_made_the_image(what):
    assert graph_prompt(MADE[what], "ComfyUI_00001_.png") == "a star"


@pytest.mark.parametrize("prompt", OTHER)
def test_a_prompt_of_parts_is_put_together(prompt):
    assert graph_prompt(OTHER[prompt]) == prompt


UNCLEAR = {
    r"written by node 10 \(OllamaGenerate\) while the graph runs": text(
        n10=node("OllamaGenerate", prompt="Describe this image in detail", model="x")
    ),
    r"written by node 10 \(SomeWriter\)": text(n10=node("SomeWriter", prompt="Write a prompt about a star", max_tokens=77)),
    r"written by node 11 \(JoyCaption\)": text(
        n10=node("ShowText|pysssss", text=["11", 0], text_0="a star"), n11=node("JoyCaption", image=["12", 0])
    ),
    r"node 30 \(ConditioningCombine\) combines 2 different prompts, such as 'a star' and 'a ring'": graph(
        n3=sampler("30"), n30=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["31", 0]), n31=RING
    ),
    r"node 30 \(ConditioningAverage\) combines 2": graph(
        n3=sampler("30"), n30=node("ConditioningAverage", conditioning_to=["6", 0], conditioning_from=["31", 0]), n31=RING
    ),
    r"node 6 \(CLIPTextEncodeSDXL\) takes 2": graph(n6=node("CLIPTextEncodeSDXL", text_g="a star", text_l="blue sky", clip=["90", 1])),
    r"the graph made images of 2": graph(
        save="30",
        n30=node("ImageBatch", image1=["8", 0], image2=["31", 0]),
        n31=node("VAEDecode", samples=["32", 0]),
        n32=sampler("33"),
        n33=RING,
    ),
    r"images of 2 different prompts": graph(save="32", n31=sampler("33", "3", 0.8), n32=node("VAEDecode", samples=["31", 0]), n33=RING),
    r"node 10 \(DPRandomGenerator\) chooses its wildcards|written by node 10": text(
        n10=node("DPRandomGenerator", text="a {star|ring}", seed=1)
    ),
    r"node 10 \(WildcardText\) chooses its wildcards": text(n10=node("WildcardText", text="a __shape__", seed=1)),
    r"node 10 is missing": text(),
    r"run in a circle": text(n10=node("Reroute", value=["10", 0])),
    r"the text of node 10 \(Odd\) is not in the graph": text(n10=node("Odd", number=1)),
    r"written by node 10 \(RegexReplace\)": text(n10=node("RegexReplace", string="a star", regex_pattern=".", replace="x")),
    r"node 10 \(ComfySwitchNode\) takes 2 different prompts": text(
        n10=node("ComfySwitchNode", switch=["90", 0], on_false="a star", on_true="a ring")
    ),
    r"the prompt is empty": graph(n6=node("CLIPTextEncode", text=" ", clip=["90", 1])),
    r"no sampler with a prompt": graph(save="30", n30=node("LoadImage", image="x.png")),
    r"no sampler": graph(save="31", n30=node("LoadImage", image="x.png"), n31=node("SomeUpscale", image=["30", 0])),
}


@pytest.mark.parametrize("reason", UNCLEAR)
def test_what_is_not_certain_is_no_prompt_and_says_why(reason):
    with pytest.raises(UnclearPrompt, match=reason):
        graph_prompt(UNCLEAR[reason])


def test_of_two_saved_images_the_file_name_tells_which():
    two = MADE["two saved images, one of another sampler"]
    assert graph_prompt(two, "other_00012_.png") == "a ring"
    with pytest.raises(UnclearPrompt, match="2 different prompts"):
        graph_prompt(two, "renamed.png")


def test_a_graph_that_would_keep_a_reader_busy_for_ever_does_not():
    """Every node named by two inputs of the one before: 2^4000 ways, and 4000 nodes deep."""
    ladder = {str(i): node("x", conditioning_1=[str(i + 1), 0], conditioning_2=[str(i + 1), 0], cond=[str(i + 1), 0]) for i in range(4000)}
    made = {"s": node("KSampler", positive=["0", 0]), **ladder, "4000": node("CLIPTextEncode", text="a star")}
    assert graph_prompt(made) == "a star"


def encoded(**nodes):
    """A sampler whose positive is node 7."""
    return graph(n3=sampler("7"), n12=node("CLIPTextEncode", text="a ring"), **nodes)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("easy anythingIndexSwitch", {"index": 1, "value0": ["6", 0], "value1": ["12", 0]}),
        ("CR Switch Any", {"select": 2, "input1": ["6", 0], "input2": ["12", 0]}),
    ],
)
def test_a_switch_of_anything_heeds_its_selector(kind, inputs):
    assert graph_prompt(encoded(n7=node(kind, **inputs))) == "a ring"


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("Text Find and Replace", {"text": "a star", "find": "star", "replace": "ring"}),
        ("CR Text Replace", {"text": "a star", "find1": "star", "replace1": "ring"}),
        ("Text String Truncate", {"text": "a star", "truncate_by": "words", "truncate_to": 1}),
        ("StringFormat", {"string": "{a} star", "a": "one"}),
    ],
)
def test_a_text_that_a_node_rewrites_is_no_prompt(kind, inputs):
    with pytest.raises(UnclearPrompt):
        graph_prompt(encoded(n20=node(kind, **inputs), n7=node("CLIPTextEncode", text=["20", 0])))


def second_pass(kind, **inputs):
    """A pass over the sampler's latent with another prompt."""
    shared = {"positive": ["12", 0], "negative": ["7", 0], "latent_image": ["3", 0]}
    return graph(
        save="18", n13=node(kind, **shared, **inputs), n12=RING, n18=node("VAEDecode", samples=["13", 0], vae=["90", 2]), n23=SIGMAS
    )


SIGMAS = node("KarrasScheduler", steps=20, sigma_max=14.6, sigma_min=0.03, rho=7.0)


def test_a_strong_second_pass_counts_however_it_is_written():
    with pytest.raises(UnclearPrompt):  # three quarters of the steps, with another prompt
        graph_prompt(second_pass("KSamplerAdvanced", add_noise="enable", start_at_step=5, end_at_step=20, steps=20))
    weak = second_pass("KSamplerAdvanced", add_noise="enable", start_at_step=15, end_at_step=20, steps=20)
    assert graph_prompt(weak) == "a star"
    assert graph_prompt(second_pass("SamplerCustom", add_noise=True, sigmas=["23", 0], sampler=["22", 0])) == "a ring"


def test_a_switch_with_two_inputs_of_a_number_gives_neither():
    """Which of positive_1 and negative_1 goes on depends on the output that is linked."""
    inputs = {"select": 1, "positive_1": ["12", 0], "negative_1": ["6", 0], "positive_2": ["6", 0], "negative_2": ["6", 0]}
    with pytest.raises(UnclearPrompt):
        graph_prompt(encoded(n7=node("Conditioning Pair Switch", **inputs)))
