# Axolotl 0.19: SFT, resume, two ranks, ZeRO-3, DPO, a 4 bit base, merge-lora, inference, and what has to be refused.

install() {
    "$venv/bin/pip" install -q "torch==2.13.0"
    "$venv/bin/pip" install -q transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 \
        huggingface_hub==1.17.0 tokenizers==0.23.1 pydantic==2.12.5 PyYAML==6.0.3 python-dotenv==1.0.1 \
        fire addict colorama requests httpx psutil click rich posthog==6.7.11 pillow "numba>=0.63.1,<1" \
        bitsandbytes==0.50.2 fastcore evaluate wandb triton==3.4.0 gradio==6.10.0 deepspeed==0.18.9 ninja
    # its other dependencies are kernels for a GPU
    "$venv/bin/pip" install -q --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
}

# yaml NAME MODEL K LINE...: NAME.yaml, which trains K matrices of MODEL; a LINE replaces that of the same key
yaml() {
    local name=$1 model=$2 k=$3
    shift 3
    python - "$name" "$model" "$k" "$@" <<'PYTHON'
import sys
import yaml

name, model, k, *lines = sys.argv[1:]
content = {
    "base_model": f"./{model}",
    "datasets": [{"path": "./alpaca.jsonl", "ds_type": "json", "type": "alpaca"}],
    "dataset_prepared_path": f"./prepared-{model}",
    "val_set_size": 0,
    "output_dir": f"./out-{name}",
    "sequence_len": 1024,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "save_steps": 2,
    "num_epochs": 1,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "plugins": ["kappatune_plugin.toolkits.axolotl.KappaTunePlugin"],
    "adapter": "kappatune",
    "kappatune": {"k": int(k)},
}
for line in lines:
    content.update(yaml.safe_load(line))
with open(f"{name}.yaml", "w") as file:
    yaml.safe_dump({key: value for key, value in content.items() if value is not None}, file, sort_keys=False)
PYTHON
}

train() { quietly "$1.log" axolotl train "$1.yaml" --launcher python "${@:2}"; }

on_two() { PYTHONPATH=$here torchrun --standalone --nproc_per_node 2 -m axolotl.cli.train "$1.yaml"; }

# merged NAME MODEL: merge-lora and our own merge agree, and nothing but the selected changed
merged() {
    quietly merge.log axolotl merge-lora "$1.yaml"
    only_selected "$2" "out-$1" "out-$1/merged"
    quietly merge.log kappatune merge "out-$1" --output_dir "merged-$1"
    cmp "out-$1/merged/model.safetensors" "merged-$1/model.safetensors"
}

export AXOLOTL_DO_NOT_TRACK=1 OMP_NUM_THREADS=1
environment python3 install

yaml llama tiny-llama 5
refused "no trained adapter" axolotl inference llama.yaml --launcher python
# its own command chooses what `train` chooses
quietly scan.log axolotl kappatune-scan llama.yaml --output scanned.json
quietly scan.log kappatune select scanned.json --k 5 --output scanned-selection.json
train llama
python - scanned-selection.json out-llama/selection.json <<'PYTHON'
import json, sys
scanned, trained = ([unit["name"] for unit in json.load(open(path))["units"]] for path in sys.argv[1:])
assert scanned == trained, (scanned, trained)
PYTHON
merged llama tiny-llama
# what `inference` loads is what was trained
quietly inference.log sh -c "echo 'the cat' | axolotl inference llama.yaml --launcher python"
python "$here/axolotl_loads.py" llama.yaml out-llama/merged

yaml resumed tiny-llama 5 "resume_from_checkpoint: ./out-llama/checkpoint-2"
train resumed
cmp out-llama/adapter_model.safetensors out-resumed/adapter_model.safetensors
yaml other tiny-llama 4 "resume_from_checkpoint: ./out-llama/checkpoint-2"
refused "trains another selection" axolotl train other.yaml --launcher python
yaml onwards tiny-llama 4 "lora_model_dir: ./out-llama"
refused "k is 5 there, 4 here" axolotl train onwards.yaml --launcher python

yaml olmoe tiny-olmoe 12 "gradient_checkpointing: true"
train olmoe
merged olmoe tiny-olmoe

pairs='datasets: [{path: ./dpo.jsonl, ds_type: json, split: train, type: {field_prompt: prompt, field_chosen: chosen,
  field_rejected: rejected, prompt_format: "{prompt}", chosen_format: "{chosen}", rejected_format: "{rejected}"}}]'
yaml dpo tiny-llama 5 "rl: dpo" "$pairs" "dataset_prepared_path: ./prepared-dpo"
train dpo
merged dpo tiny-llama
[ ! -e out-dpo/model.safetensors ]

# a base that bitsandbytes quantized before it was saved
quietly quantized.log python "$here/make_quantized.py" .
yaml quantized tiny-llama-4bit 5
train quantized
merged quantized tiny-llama-4bit-whole

ranks='plugins: [kappatune_plugin.toolkits.axolotl.KappaTunePlugin, axolotl_cpu_ranks.CpuRanks]'
zero3='deepspeed: ./zero3.json'
yaml ddp tiny-olmoe 12 "$ranks" "micro_batch_size: 1"
quietly ddp.log on_two ddp
yaml ddp tiny-olmoe 12
merged ddp tiny-olmoe
yaml zero3 tiny-olmoe 12 "$ranks" "micro_batch_size: 1" "$zero3" "gradient_checkpointing: true"
quietly zero3.log on_two zero3
yaml zero3 tiny-olmoe 12
merged zero3 tiny-olmoe
yaml crash tiny-llama 5 "$ranks" "micro_batch_size: 1" "$zero3" "gradient_checkpointing: true" \
    "gradient_checkpointing_kwargs: {use_reentrant: false}"
refused "ZeRO-3 of DeepSpeed 0.18.9" on_two crash

yaml conflicts tiny-llama 5 "unfrozen_parameters: [lm_head]" "lora_r: 8" "load_in_4bit: true"
refused "lora_r: another method's" axolotl train conflicts.yaml --launcher python
yaml misspelt tiny-llama 5 "kapatune: {k: 3}" "kappatune: null"
refused "Did you mean 'kappatune'?" axolotl train misspelt.yaml --launcher python
yaml unknown tiny-llama 5 "kappatune: {k: 3, odrer: lowest}"
refused "odrer" axolotl train unknown.yaml --launcher python

# LoRA recipes that `kappatune convert` turned into KappaTune's
mkdir converted
quietly converted.log python "$here/parse_examples.py" axolotl "$work/tiny-llama" converted
