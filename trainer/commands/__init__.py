"""The commands of `python -m trainer`. Each is a module of this package, imported only when it runs.

A command module has `configure(parser)`, which adds its arguments, and `run(args)`, which returns the exit status.
"""

COMMANDS: dict[str, str] = {
    "demo": "Train ReFL and ImageReFL on the embedded model, generate, evaluate, and write report.html.",
    "preset": "Write the settings of a training run for an objective and a model family.",
    "train": "Train a LoRA by rewards or preferences.",
    "sample": "Generate images: base model first, tuned model from the switch on.",
    "score": "Score images by one or more rewards: folders, globs or manifests in, CSV and JSONL out.",
    "pairs": "Make pairs and likes to learn from: draw or read images, score, label, filter, split.",
    "taste": "Fit a reward to a person's choices between images, and say which images to judge next.",
    "rewards": "List rewards with licence and source, download their weights, measure their statistics.",
    "evaluate": "Compare tuned models with their base: rewards, diversity, distances, frontier.",
    "compare": "Train several methods on the embedded model under one budget of denoiser calls and compare them.",
    "compare-sampling": "Compare searches by reward on the embedded model at equal numbers of model calls.",
    "convert": "Convert a LoRA to another layout, or extract one from a full fine-tune.",
    "doctor": "Say what is installed here and what would not work: the text that a report of a problem should hold.",
}
"""The name of each command, whose module has _ for -, and one line of help."""
