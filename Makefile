# Every target sets up what it needs in .venv; the second time that takes a moment. Windows: see the pip lines in README.md.
PYTHON ?= python3
PY := .venv/bin/python
COMFY := $(shell $(PYTHON) tests/helpers/hosts.py --any 2>/dev/null)
# The newest that .venv has the packages for; says which, and which are left out
TESTED = $$($(PY) tests/helpers/hosts.py)
export OMP_WAIT_POLICY ?= PASSIVE
# One worker per core of a small machine; a file stays with its worker, whose fixtures it shares
WORKERS := -n 2 --dist loadfile

.PHONY: demo demo-quick demo-images test test-ladder test-all check setup benchmark bench-gpu gpu-report test-gpu verify-large

demo: .venv/train
	$(PY) -m trainer demo --out demo --overwrite

demo-quick: .venv/train
	$(PY) -m trainer demo --out demo --overwrite --quick

# The images of README.md, from a run of the demo
demo-images: demo
	cp demo/overview.png docs/images/demo.png
	cp demo/overview-narrow.png docs/images/demo-narrow.png

test: .venv/test $(if $(COMFY),.venv/comfy)
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(TESTED)" $(PY) -m pytest $(WORKERS)

# The nodes on every ComfyUI that is found; COMFYUI_LADDER=DIR:DIR names more
test-ladder: .venv/test $(if $(COMFY),.venv/ladder)
	OMP_NUM_THREADS=1 $(PY) tests/ladder.py $(WORKERS) tests/nodes

# Products, ladders and whole sizes too: about an hour on two cores
test-all: .venv/test $(if $(COMFY),.venv/comfy)
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(TESTED)" $(PY) -m pytest $(WORKERS) -m ""
	$(MAKE) verify-large

check: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(TESTED)" $(PY) -m pytest $(WORKERS)

benchmark: .venv/train
	OMP_NUM_THREADS=1 $(PY) -m tools.embedded.benchmark docs/benchmarks.md

# SD1.5 at 512 and SDXL at 1024 pixels with HPSv2.1's architecture, random weights; says so where there is no CUDA device
bench-gpu: .venv/test
	PYTHONPATH=. HF_HUB_OFFLINE=1 $(PY) tests/large/bench.py $(BENCH)

# On a card: the tests of the second device in its place, against the CPU (every objective, the families, the commands), and the nodes
test-gpu: .venv/test $(if $(COMFY),.venv/comfy)
	OMP_NUM_THREADS=1 COMFYUI_PATH="$(TESTED)" TEST_DEVICE=$${TEST_DEVICE:-cuda:0} $(PY) -m pytest tests/fake_device tests/nodes/test_card.py -m "" -n 4

# Everything that the project wants to know of a card, in one file to paste: gpu-report.md
gpu-report: .venv/test
	PYTHONPATH=. HF_HUB_OFFLINE=1 COMFYUI_PATH="$(TESTED)" $(PY) tests/large/gpu_report.py $(REPORT)

# True configurations of the published models on random weights; outside the suite: minutes a model, 7 GB and more
verify-large: .venv/test $(if $(COMFY),.venv/comfy)
	PYTHONPATH=. OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 COMFYUI_PATH="$(TESTED)" $(PY) tests/large/verify.py $(MODELS)

setup: .venv/test

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON); install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "missing: Python 3.10 or newer ($(PYTHON) is older); try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "missing: the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/train: .venv/bin/python pyproject.toml
	@echo "installing the trainer's packages into .venv (torch is several GB the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[train]"
	@touch $@

.venv/test: .venv/train
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[train,test]"
	@touch $@

.venv/comfy: .venv/test
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[train,test,comfy]"
	@touch $@

.venv/ladder: .venv/comfy
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[train,test,comfy,comfy-new]"
	@touch $@
