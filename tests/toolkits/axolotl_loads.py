"""`python axolotl_loads.py YAML MERGED`: the model that `axolotl inference YAML` answers with is the one in MERGED."""

import sys

import torch
from axolotl.cli.config import load_cfg
from axolotl.cli.utils import load_model_and_tokenizer
from transformers import AutoModelForCausalLM

model, _, _ = load_model_and_tokenizer(cfg=load_cfg(sys.argv[1], inference=True, rl=None), inference=True)
found, expected = model.get_base_model().state_dict(), AutoModelForCausalLM.from_pretrained(sys.argv[2]).state_dict()
assert all(torch.equal(found[name], value) for name, value in expected.items())
print(f"axolotl inference {sys.argv[1]} runs the trained model")
