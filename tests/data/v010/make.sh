#!/bin/sh
# Makes this folder by version 0.1.0: sh make.sh CHECKOUT_OF_0.1.0, in a copy that holds the TOML files, brightness.py and this file
set -eu
export PYTHONPATH="$1" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PY="${PYTHON:-$1/.venv/bin/python}"
trainer() { "$PY" -m trainer "$@"; }
mkdir -p images presets workflows
cp "$1"/presets/*.toml presets/
cp "$1"/workflows/*.json workflows/
"$PY" - <<'P'
from pathlib import Path
from trainer import images
from trainer.demo.show import real_images
pictures, captions = real_images(4, 0)
for i, (picture, caption) in enumerate(zip(pictures, captions)):
    images.to_pil(picture).save(f"images/{i}.png")
    Path(f"images/{i}.txt").write_text(caption + "\n")
Path("prompts.txt").write_text("\n".join(captions) + "\n")
P
for run in imagerefl sqdf sqdf-black-box srpo draft-lv full; do trainer train $run.toml --overwrite; done
# encoded images, 2 kB each; the prompts' files have 40 kB and are left out
trainer train imagerefl.toml --cache=cache --out=cached --steps=1 --watch.every=0 --overwrite
rm -r cached
find cache -size +4k -delete
trainer convert imagerefl/lora.safetensors converted-peft --to peft --overwrite
trainer convert imagerefl/lora.safetensors converted-diffusers.safetensors --to diffusers --overwrite
trainer rewards calibrate brightness.py images --prompt none
trainer score images --reward demo-proxy --reward demo-heldout=0.5 --out scores.csv --out scores.jsonl --overwrite
set -- --lora tuned=imagerefl/lora.safetensors --prompts prompts.txt -n 2 --steps 4 --chunk 4 --switches 0,2 --reward demo-proxy
trainer evaluate "$@" --out evaluate.json --overwrite
# the same, interrupted: two of four pictures scored, one of two parts judged
"$PY" - "$@" <<'P'
import contextlib, sys
from trainer.__main__ import main
from trainer.metrics.study import Study
from trainer.scoring import command
from trainer.scoring.journal import Journal
append, add, added = Journal.append, Study.add, []
def two(self, rows):
    for i, row in enumerate(append(self, rows)):
        yield row
        if i == 1:
            raise KeyboardInterrupt
def one(self, part, images):
    if added:
        raise KeyboardInterrupt
    added.append(add(self, part, images))
Journal.append, Study.add = two, one
with contextlib.suppress(KeyboardInterrupt):
    main(["score", "images", "--reward", "demo-proxy", "--reward", "demo-heldout=0.5", "--out", "stopped.csv", "--batch", "2", "--overwrite"])
with contextlib.suppress(KeyboardInterrupt):
    main(["evaluate", *sys.argv[1:], "--out", "stopped.json", "--overwrite"])
P
# the differences of a full fine-tune take 5 MB: 24 small ones are kept, and nothing else of that run
"$PY" - <<'P'
from safetensors import safe_open
from safetensors.torch import save_file
with safe_open("full/delta.safetensors", "pt") as file:
    tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
small = sorted(tensors, key=lambda k: (tensors[k].numel(), k))
wide = [k for k in small if tensors[k].ndim == 2][:4]
save_file({k: tensors[k].contiguous() for k in [*small[:20], *wide]}, "delta.safetensors", metadata=header)
P
trainer convert delta.safetensors delta-lora.safetensors --rank 2 --overwrite
"$PY" expect.py
rm -r full
rm -f */.lock
