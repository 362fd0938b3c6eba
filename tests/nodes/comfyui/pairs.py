"""Run inside a ComfyUI, after folder.py: pairs made, filtered, saved and loaded in a graph, and trained on as the command does.

Its `gradients` compares one step of each objective with the headless trainer.
"""

import contextlib
import dataclasses
import io
import json
import shutil

import folder as before  # its folders, nodes and settings
import torch

N, here, ours = before.N, before.here, before.ours
preferences, training_data, samples = ours("nodes.preferences"), ours("nodes.training_data"), ours("trainer.data.samples")
batches, objectives = ours("trainer.data.batches"), ours("trainer.objectives")
results = {"refused": {}}
PROMPTS = "a red star\na red star\na red star\na blue ring\na blue ring\na blue ring\na circle\na circle\na circle\nA  circle"


def ask(name, action):
    results["refused"][name] = before.embedded.refused(action)


def make(images, **more):
    given = {"images": [images], "reward": [load("demo-proxy")], "prompts": [PROMPTS], "label": ["sum"], "per_prompt": [1], **more}
    return N["MakePairs"].execute(**given).result


def filter_(pairs, **more):
    values = {"min_margin": 0.0, "max_margin": 0.0, "min_agreement": 0.0, "near_copies": 0.02, "per_prompt": 0, "keep": 0}
    values |= {"diversity_weight": 0.0, "neighbours": 5, "split": 0.0, "split_seed": 0}
    return N["FilterPairs"].execute(pairs=pairs, **{**values, **more}).result


def gradients(headless, policy):
    """Relative errors of one step's gradient, and of the latents, on pairs of a graph against those of the saved table."""
    found = {}
    data = lambda kind: training_data.training_data("", None, None, (64, 64), 64, made, kind)  # noqa: E731
    for name, objective in {
        "diffusion-dpo": objectives.OBJECTIVES["diffusion-dpo"](beta=200.0),
        "unsafe dpo": objectives.OBJECTIVES["diffusion-dpo"](beta=200.0, safeguard=False, prompt_dropout=0.5),
        "diffusion-kto": objectives.OBJECTIVES["diffusion-kto"](beta=50.0),
        "mapo": objectives.OBJECTIVES["mapo"](),
        "diffusion-npo": objectives.OBJECTIVES["diffusion-npo"](beta=200.0),
        "chats": objectives.OBJECTIVES["chats"](beta=200.0),
    }.items():
        kind, measured = objective.data, []
        table = {"labels" if kind is batches.Labels else "pairs": str(saved / ("labels" if kind is batches.Labels else "pairs")) + ".jsonl"}
        with contextlib.redirect_stdout(io.StringIO()):
            there = samples.load_samples(headless, "", "", ((64, 64),), **table)
        for one, own in ((headless, there), (policy, data(kind).samples(policy))):
            for parameter in one.parameters():
                parameter.grad = None
            objective.begin(objectives.RunContext(one, None))(own.batch(0, 0, 0, 3))[0].backward()
            measured.append(torch.cat([p.grad.flatten() for _, p in sorted(one.named_parameters()) if p.grad is not None]))
        found[name] = float((measured[0] - measured[1]).norm() / measured[0].norm())
        found[f"norm of {name}"] = float(measured[0].norm())
    return found


with torch.inference_mode():
    load = ours("nodes.rewards").load
    images = ours("nodes.sockets").image(ours("trainer.demo.world").real_images(10, 3)[0])
    made, preview, report = make(images)
    results["made"] = [len(made.pairs), list(preview.shape), report]
    # by hand: the best and the worst of each prompt
    texts = PROMPTS.splitlines()
    scores = N["Score"].execute([images], [load("demo-proxy")], [PROMPTS], [True]).result[0]
    groups = [[i for i, text in enumerate(texts) if text == prompt] for prompt in dict.fromkeys(texts[:9])]
    expected = [[f"image {pick(group, key=lambda i: scores[i])}" for pick in (max, min)] for group in groups]
    results["best and worst"] = sorted(expected) == sorted([str(pair.chosen), str(pair.rejected)] for pair in made.pairs)
    grey = [make(torch.cat([images.mean(-1, keepdim=True)] * channels, -1)) for channels in (1, 3)]
    alpha = make(torch.cat([images, torch.zeros_like(images[..., :1])], -1))[0]
    scored = [[pair.gaps for pair in one.pairs] for one in (grey[0][0], grey[1][0], alpha, made)]
    results["channels"] = [scored[0] == scored[1], scored[2] == scored[3], list(grey[0][1].shape)]
    every, _, _ = make(images, per_prompt=[0], label=["majority"], reward_b=[load("demo-gold")], heldout=[load("demo-heldout")])
    kept, held, _, said = filter_(every, min_agreement=1.0, per_prompt=1, split=0.4, features=load("demo-proxy"), diversity_weight=0.1)
    results["filtered"] = [len(every.pairs), len(kept.pairs), len(held.pairs), said]
    results["sides"] = not {pair.prompt for pair in kept.pairs} & {pair.prompt for pair in held.pairs}

    folders = [N["SavePairs"].execute(pairs=made, name="../a/b").result[0] for _ in range(2)]
    saved = before.Path(folders[0])
    results["saved"] = [str(before.Path(folder).relative_to(here)) for folder in folders]
    name = f"output/{saved.relative_to(here / 'output')}/pairs.jsonl"
    loaded = N["LoadPairs"].execute(table=name).result[0]
    same = lambda a, b: a.read_bytes() == b.read_bytes()  # noqa: E731
    both = list(zip(made.pairs, loaded.pairs))
    results["loaded"] = len(both) == len(made.pairs) and all(
        same(a.chosen, b.chosen) and same(a.rejected, b.rejected) and a.prompt == b.prompt and abs(a.margin - b.margin) < 1e-6
        for a, b in both
    )
    (here / "input" / "out pairs.csv").write_text(f"chosen,rejected,prompt\n{here}/elsewhere/secret/g.png,stars/2_red/a.png,p\n")
    results["tables"] = [choice for choice in N["LoadPairs"].define_schema().inputs[0].options]

    def train(objective, run="dpo", data=made, **more):
        given = {**before.common, "name": run, "lr": 1e-3, "batch": 3, **more}
        for key in ("sampler_steps", "switch_at", "refl_share", "diffusion_weight", "guidance"):
            given.pop(key, None)
        return N["AlignTrain"].execute(objective=objective, pairs=data, **{**given, **{"model": before.model, "clip": before.clip}}).result

    train(N["ObjectiveCHATS"].execute().result[0], "two", steps=1)
    listed = [name for name in ours("nodes.lora").names() if name.startswith("run: two")]
    results["two"] = [listed, [str(ours("nodes.lora").path_of(name).relative_to(here / "output")) for name in listed]]
    dpo = N["ObjectiveDiffusionDPO"].execute(beta=200.0).result[0]
    kto = N["ObjectiveDiffusionKTO"].execute(beta=50.0).result[0]
    results["report"] = train(dpo, data=loaded)[5]
    results["likes"] = train(kto, "kto", steps=1)[5]
    # captions alone: its log has no reward either
    captions = {"images": images[:2], "prompts": "a red star\na blue ring"}
    results["captions"] = train(N["ObjectiveTPO"].execute().result[0], "tpo", None, steps=1, batch=2, **captions)[5]

    def headless(run, **data):
        given = {**before.settings, **data, "batch_size": 3, "out": here / run, "model": "demo", "objective.name": "diffusion-dpo"}
        given = {key: value for key, value in given.items() if not key.startswith("objective.") or key == "objective.name"}
        with torch.inference_mode(False), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            arguments = [f"--{key}={value}" for key, value in {**given, "objective.beta": 200.0}.items()]
            assert ours("trainer.__main__").main(["train", *arguments]) == 0
        return here / run

    there = headless("headless dpo", pairs=saved / "pairs.jsonl")
    graph = before.runs.run_folder("dpo", "dpo")
    results["log"] = [[json.loads(line)["loss"] for line in (run / "log.jsonl").read_text("utf-8").splitlines()] for run in (graph, there)]
    mine, theirs = before.lora(graph), before.lora(there)
    results["lora"] = [float((mine - theirs).norm() / theirs.norm()), float(theirs.norm())]

    awm = N["ObjectiveAWM"].execute(steps=3, group=2, prompts_per_round=1, levels=1).result[0]
    results["warned"] = train(awm, "awm", None, prompts="a star", steps=2, batch=1)[5]
    refl = N["ObjectiveReFL"].execute().result[0]
    sum_ = N["CombineRewards"].execute(True, reward_a=load("demo-gold"), weight_a=1.0, reward_b=load("demo-proxy"), weight_b=0.5).result[0]
    for name, reward in (("same heldout", load("demo-proxy")), ("heldout in a sum", sum_)):
        ask(name, lambda reward=reward: train(awm, "x", None, prompts="a star", reward=reward, heldout=load("demo-proxy")))
    weightless = N["CombineRewards"].execute(True, reward_a=load("demo-gold"), weight_a=1.0, reward_b=load("demo-proxy"), weight_b=0.0)
    rewards = ours("nodes.rewards")
    copy = shutil.copytree(before.Path(ours("trainer.demo.files").FOLDER) / "proxy", here / "copy of proxy")
    renamed = dataclasses.replace(load("demo-proxy"), name="renamed", source=str(copy))
    judged = [(load("demo-proxy"), weightless.result[0]), (load("demo-heldout"), sum_), (renamed, sum_)]
    results["apart"] = [rewards.trained_on(judge, [reward]) for judge, reward in judged]
    again = {"resume": before.runs.LAST, "heldout": load("demo-proxy"), "prompts": "a star", "steps": 3, "batch": 1}
    results["resumed with it"] = train(awm, "awm", None, **again)[5]
    ask("no pairs", lambda: train(dpo, "x", None, prompts="a star"))
    ask("nothing at all", lambda: train(dpo, "x", None, prompts=""))
    ask("images too", lambda: train(dpo, "x", images=images))
    ask("prompts too", lambda: train(dpo, "x", prompts="a star"))
    ask("another objective", lambda: train(refl, "x"))
    ask("one image", lambda: train(kto, "x", batch=1))
    ask("odd size", lambda: train(dpo, "x", image_size=60))
    ask("other pairs", lambda: train(dpo, "dpo", every, resume=before.runs.LAST, steps=9))
    ask("nothing held out", lambda: N["SavePairs"].execute(pairs=ours("nodes.preferences").PreferencePairs(()), name="x"))
    ask("outside", lambda: N["LoadPairs"].execute(table="input/out pairs.csv"))
    ask("not listed", lambda: N["LoadPairs"].execute(table="../secret/pairs.csv"))
    ask("alone", lambda: make(images[:2], prompts=["a\nb"]))
    ask("no prompt", lambda: make(images, prompts=[""]))
    ask("twice", lambda: make(images, reward_b=[load("demo-proxy")]))
    ask("held out", lambda: make(images, heldout=[load("demo-proxy")]))
    ask("copies", lambda: make(images[:1].repeat(10, 1, 1, 1)))
    ask("no scale", lambda: make(images, reward_b=[load("compressibility")]))
    ask("margin", lambda: filter_(made, min_margin=99.0))
    ask("no features", lambda: filter_(made, diversity_weight=1.0))
    unscored = ours("nodes.preferences").PreferencePairs(
        tuple(ours("trainer.pairs.label").Pair(p.chosen, p.rejected, p.prompt) for p in made.pairs)
    )
    ask("unscored", lambda: filter_(unscored))
