# TRL: `kappatune sft` and `merge`, one process and two, and the tests that rest on TRL, PEFT, transformers, DeepSpeed.

# trl-old: the versions that LLaMA-Factory 0.9.5 has; trl-mid: those of Axolotl 0.19; trl-latest: the newest there are
install() {
    local versions
    case $name in
        trl-old) versions="transformers==4.57.6 trl==0.24.0 peft==0.18.1 accelerate<=1.11 datasets<=4.0 deepspeed==0.18.9" ;;
        # TRL 1.9 imports requests for GRPO and doesn't ask for it
        trl-mid) versions="transformers==5.16.1 trl==1.9.2 peft==0.20.0 deepspeed==0.18.9 requests" ;;
        trl-latest) versions="transformers trl peft accelerate datasets deepspeed" ;;
        *) echo "TRL's environments are trl-old, trl-mid and trl-latest" >&2; return 2 ;;
    esac
    # shellcheck disable=SC2086
    "$venv/bin/pip" install -q torch==2.13.0 setuptools ninja pytest bitsandbytes $versions -e "$repository"
}

# train MODEL COMMAND...: a recipe run by COMMAND, merged, and compared with the model it began with
train() {
    local model=$1 run=$work/run-$1-$#
    shift
    cat > "$run.yaml" <<YAML
model_name_or_path: $work/$model
output_dir: $run
dtype: float32
bf16: false
use_cpu: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 1.0e-2
weight_decay: 0.1
max_steps: 3
per_device_train_batch_size: 4
save_strategy: 'no'
report_to: none
disable_tqdm: true
kappatune_k: 9
data: {train: {path: $work/text.jsonl}}
YAML
    quietly "$run.log" "$@" sft --config "$run.yaml"
    quietly "$run.log" kappatune merge "$run" --output_dir "$run-merged"
    only_selected "$work/$model" "$run" "$run-merged"
}

environment python3 install
for model in tiny-llama tiny-olmoe; do
    train "$model" kappatune
    train "$model" torchrun --standalone --nproc_per_node 2 --no-python kappatune
done

if [ "$name" = trl-old ]; then
    # a tokenizer that transformers 5 saved
    cp -r "$work/tiny-llama" "$work/newer"
    sed -i 's/"tokenizer_class": "[^"]*"/"tokenizer_class": "TokenizersBackend"/' "$work/newer/tokenizer_config.json"
    refused "transformers 5 saved it" kappatune sft --config "$work/run-tiny-llama-2.yaml" \
        --model_name_or_path "$work/newer" --output_dir "$work/run-newer"
fi

if [ ! "$quick" ]; then
    cd "$repository/tests"
    echo "== pytest"
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$folder/extensions-$name
    # transformers 4 weighs the losses of ranks otherwise, and needs a GPU for FSDP
    ranks=distributed/test_training.py
    [ "$name" != trl-old ] || ranks=
    # README gets the row only when all this has run
    # shellcheck disable=SC2086
    python -m pytest -p no:cacheprovider --junitxml "$work/tests.xml" \
        --deselect tests/test_versions.py::test_readmes_table_is_what_was_recorded \
        test_versions.py weights/test_units.py weights/test_quantized.py distributed/test_unsupported.py tuner \
        recipe/test_recipe.py run/test_train.py toolkits/test_plan.py $ranks
fi
