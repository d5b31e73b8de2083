"""A tiny Llama as it is, quantized, and as what the quantized one stands for: `make_quantized.py FOLDER`

FOLDER/tiny-llama-4bit is what people find on the hub as NAME-bnb-4bit, made of FOLDER/tiny-llama-wide;
FOLDER/tiny-llama-4bit-whole holds its numbers in float32, to compare with. Their tokenizer is FOLDER/tiny-llama's.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.tiny import tiny_model
from kappatune_plugin.weights.quantized import whole_model


def make_quantized(folder: Path) -> None:
    """Rows of 64 and 128 values: bitsandbytes' blocks of 64 have to divide them on a CPU."""
    lengths = {"vocab_size": 300, "max_position_embeddings": 1024}
    wide, quantized, whole = (folder / f"tiny-llama-{name}" for name in ("wide", "4bit", "4bit-whole"))
    tiny_model("llama", hidden_size=64, intermediate_size=128, **lengths).save_pretrained(wide)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(quantized)
    whole_model(model).save_pretrained(whole)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-llama")
    for made in (wide, quantized, whole):
        tokenizer.save_pretrained(made)


if __name__ == "__main__":
    make_quantized(Path(sys.argv[1]))
