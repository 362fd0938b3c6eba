"""Run inside a ComfyUI: one training step in a graph has the gradient of the headless trainer.

Usage: gradient.py COMFYUI PACK PIPELINE. Prints one JSON line of relative errors, and what folder.py prints.
"""

import json
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import torch

(pipeline_folder,) = embedded.arguments
demo, graph, trainer = (embedded.ours(name) for name in ("nodes.demo", "nodes.policy", "trainer.models.unet"))
objectives, data, core = (embedded.ours(f"trainer.{name}") for name in ("objectives", "data.samples", "policy"))
earlier = Path(__file__).parents[2] / "data" / "v010" / "rewards" / "proxy"  # a transformer; SRPO's difference of scores is larger in it
reward = embedded.ours("trainer.rewards.registry").load_reward(str(earlier), True)
prompts = ("a red star", "a blue ring", "a large green square, vivid", "a circle")
lora = core.Lora(rank=4, alpha=8.0, targets=("to_q", "to_out.0", "conv1", "proj_in"))
images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
errors = {}
with torch.inference_mode():
    model, clip, vae = (load(Path(pipeline_folder)) for load in (demo.load_model, demo.load_clip, demo.load_vae))

headless = trainer.UNetPolicy.load(pipeline_folder)
both = ("tuned", "tuned-loser")  # what CHATS trains; of the others the second has no gradient
headless.add_lora(lora, 3, both)
# between the levels of its table, where SRPO's lie, ComfyUI asks the network at the nearest timestep, and we at a fraction of one
between = headless.timestep
headless.timestep = lambda sigma: between(sigma).round()
mean = headless.encode(images)[0]
samples = data.Samples(prompts, data.LatentsInMemory(mean, torch.zeros_like(mean)))
with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
    policy = graph.ComfyPolicy(model, vae, lambda p: clip.encode_from_tokens_scheduled(clip.tokenize(p)), (4, 8, 8))
    policy.add_lora(lora, 3, both)
    for name, parameter in [*headless.named_parameters(), *policy.named_parameters()]:
        if "lora_B" in name:  # away from the identity, where half of the gradients vanish
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    policy.gradient_checkpointing(denoiser=True, vae=True)
    with policy.loaded([], 4):
        errors["latents"] = float((policy.encode(images)[0] - mean).abs().max())
        for name, objective in {
            "refl": objectives.ReFL(steps=6, grad_from=3, grad_to=5, kl_weight=0.5),
            "guided": objectives.ReFL(steps=6, grad_from=3, grad_to=5, guidance_scale=3.0),
            "imagerefl": objectives.ImageReFL(steps=6, grad_from=3, grad_to=5, start_from=3, start_to=3, refl_share=0.0),
            "draft-k": objectives.DRaFTK(steps=6, k=2, guidance_scale=1.0),
            "srpo": objectives.SRPO(
                steps=6, source="offline", sigma_low=0.3, sigma_high=0.8, gap=0.5, positive=("crisp",), negative=("blurred",)
            ),
            "sqdf": objectives.SQDF(steps=6, guidance_scale=1.0, buffer_gb=0.0),
        }.items():
            gradients = []
            for one in (headless, policy):
                for parameter in one.parameters():
                    parameter.grad = None
                objective.begin(objectives.RunContext(one, reward))(samples.batch(0, 0, 0, 4))[0].backward()
                gradients.append({n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None})
            assert gradients[0].keys() == gradients[1].keys(), sorted(gradients[0].keys() ^ gradients[1].keys())[:4]
            ours, theirs = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in gradients)
            errors[name] = float((ours - theirs).norm() / ours.norm())
    errors["modules"] = len(policy.named_parameters()) // len(both)
import folder
import pairs

with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad(), policy.loaded([], 3):
    errors["preferences"] = pairs.gradients(headless, policy)

errors["folder"], errors["pairs"] = folder.results, pairs.results
print(json.dumps(errors))
