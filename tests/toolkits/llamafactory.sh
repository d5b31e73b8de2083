# LLaMA-Factory 0.9.5 with the newest transformers it takes, or as llamafactory-4 with transformers 4: SFT, resume,
# two ranks, ZeRO-3, DPO, a 4 bit base, export, and what has to be refused.

install() {
    local transformers=5.6.0
    [ "$name" = llamafactory ] || transformers=4.57.6
    "$venv/bin/pip" install -q "torch==2.13.0"
    "$venv/bin/pip" install -q "transformers==$transformers" peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 \
        trl==0.24.0 omegaconf pyyaml deepspeed==0.18.9 ninja bitsandbytes==0.50.2
    # its other dependencies serve its web pages and other data than text
    "$venv/bin/pip" install -q --no-deps llamafactory==0.9.5 torchaudio==2.11.0
    # there is no torchaudio for the CPU on PyPI; without its binaries it imports
    rm -f "$venv"/lib/python3*/site-packages/torchaudio/lib/*.so
}

# yaml NAME MODEL K LINE...: NAME.yaml, which trains K matrices of MODEL
yaml() {
    cat > "$1.yaml" <<YAML
model_name_or_path: ./$2
stage: sft
do_train: true
finetuning_type: kappatune
kappatune_k: $3
dataset: tiny
dataset_dir: .
template: default
cutoff_len: 512
output_dir: ./out-$1
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 4
save_steps: 2
learning_rate: 0.01
weight_decay: 0.1
lr_scheduler_type: constant
logging_steps: 1
report_to: none
YAML
    printf '%s\n' "${@:4}" >> "$1.yaml"
}

train() { quietly "$1.log" kappatune llamafactory train "$1.yaml" "${@:2}"; }

# merged NAME MODEL: our merge, and LLaMA-Factory's export, and nothing but the selected changed
merged() {
    cat > export.yaml <<YAML
model_name_or_path: ./$2
adapter_name_or_path: ./out-$1
finetuning_type: kappatune
template: default
export_dir: ./exported-$1
export_device: cpu
infer_dtype: float32
YAML
    quietly export.log kappatune llamafactory export export.yaml
    only_selected "$2" "out-$1" "exported-$1"
    quietly merge.log kappatune merge "out-$1" --output_dir "merged-$1"
    cmp "exported-$1/model.safetensors" "merged-$1/model.safetensors"
}

export OMP_NUM_THREADS=1
environment python3 install

yaml llama tiny-llama 5
train llama
merged llama tiny-llama

yaml resumed tiny-llama 5 "resume_from_checkpoint: ./out-llama/checkpoint-2"
train resumed
cmp out-llama/adapter_model.safetensors out-resumed/adapter_model.safetensors
refused "trains another selection" kappatune llamafactory train resumed.yaml kappatune_k=4 output_dir=./out-other
yaml onwards tiny-llama 5 "adapter_name_or_path: ./out-llama"
train onwards
merged onwards tiny-llama
refused "k is 5 there, 4 here" kappatune llamafactory train onwards.yaml kappatune_k=4

yaml olmoe tiny-olmoe 12
train olmoe
merged olmoe tiny-olmoe

yaml dpo tiny-llama 5
train dpo stage=dpo dataset=pairs
merged dpo tiny-llama

# a base that is quantized when it is loaded; LLaMA-Factory exports none
quietly quantized.log python "$here/make_quantized.py" .
yaml quantized tiny-llama-wide 5 "quantization_bit: 4" "double_quantization: false"
train quantized
quietly merge.log kappatune merge out-quantized --output_dir merged-quantized
only_selected tiny-llama-4bit-whole out-quantized merged-quantized

yaml ddp tiny-olmoe 12
FORCE_TORCHRUN=1 NPROC_PER_NODE=2 train ddp per_device_train_batch_size=1
merged ddp tiny-olmoe
yaml zero3 tiny-olmoe 12 "deepspeed: ./zero3.json"
FORCE_TORCHRUN=1 NPROC_PER_NODE=2 train zero3 per_device_train_batch_size=1
merged zero3 tiny-olmoe

yaml conflicts tiny-llama 5 "lora_rank: 8"
refused "lora_rank: another method's" kappatune llamafactory train conflicts.yaml
yaml misspelt tiny-llama 5 "kappatune_odrer: lowest"
refused "kappatune_odrer" kappatune llamafactory train misspelt.yaml
grep -v adapter_name_or_path export.yaml > untrained.yaml
refused "no trained adapter" kappatune llamafactory export untrained.yaml
# the launcher that doesn't know the method refuses it too
refused "Invalid fine-tuning method" llamafactory-cli train llama.yaml

# LoRA recipes that `kappatune convert` turned into KappaTune's
mkdir converted
quietly converted.log python "$here/parse_examples.py" llamafactory "$work/tiny-llama" converted
