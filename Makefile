# Each target does its own set-up: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready
DATA   ?= data/coco

.PHONY: quickstart demo reproduce simclip clip_po change lint check test photo llm clean help

help:
	@echo "make quickstart   write differences, finetune, evaluate on the embedded example; print one table"
	@echo "make demo         a page in the browser to try the example's model, before and after finetuning"
	@echo "make reproduce    the same with three seeds, and the paper's other evaluations"
	@echo "make simclip      batches of similar examples against random ones, and hard pairs; an hour or more on two cores"
	@echo "make clip_po      preference tuning against plain finetuning with the same negatives; an hour and a half on two cores"
	@echo "make change       what changed between two scenes: adapted, then captioned (CLIP4IDC); three hours on two cores"
	@echo "make check        ruff, the layers of imports, the fast tests"
	@echo "make test         the same and the slow tests"
	@echo "make photo DATA=folder   the same scripts on photographs with human captions (COCO's layout)"
	@echo "make llm DATA=folder     a small language model writes 600 differences of those photographs; an audit"
	@echo "make clean        remove runs and results (not data, not .venv)"

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Try make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the requirements into $(VENV) (once) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(READY)

quickstart: $(READY)
	@$(RUN) -m pc_clip study configs/studies/quickstart.yaml --variants base pc any_wording

demo: $(READY)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@test -f runs/quickstart/any_wording-seed0/model.safetensors || \
	  { $(RUN) generate_diffs.py && $(RUN) finetune.py --resume true; }
	@$(RUN) -m pc_clip demo

reproduce: $(READY)
	@for study in quickstart comparative averaging space; do \
	  $(RUN) -m pc_clip study configs/studies/$$study.yaml --seeds 0 1 2 || exit $$?; done

simclip: $(READY)
	@for study in simclip simclip_towers simclip_scratch hard_pairs; do \
	  $(RUN) -m pc_clip study configs/studies/$$study.yaml --seeds 0 1 2 || exit $$?; done

change: $(READY)
	@for study in change change_beams change_pc; do \
	  $(RUN) -m pc_clip study configs/studies/$$study.yaml --seeds 0 1 2 || exit $$?; done

clip_po: $(READY)
	@$(RUN) -m pc_clip study configs/studies/clip_po.yaml --seeds 0 1 2
	@$(RUN) -m pc_clip study configs/studies/clip_po_text.yaml --seeds 0

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check --quiet .
	@$(VENV)/bin/lint-imports

# A file stays in one process, so that what its tests share is made once.
TESTS  := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	@$(TESTS)

check: lint
	@$(TESTS) -m "not slow"

photo: $(READY)
	@$(RUN) -m examples.photographs $(DATA)
	@$(RUN) -m pc_clip study configs/studies/photo.yaml --seeds 0 1 2

llm: $(READY)
	@$(RUN) -m examples.photographs $(DATA)
	@$(RUN) generate_diffs.py --config configs/diffs_photo_llm.yaml
	@$(RUN) -m pc_clip audit llm_diffs/photo_llm.jsonl

clean:
	rm -rf runs results
