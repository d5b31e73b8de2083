# What the toolkits' scripts share; run.sh sources it with $name, $here and $folder set.
repository=$(cd "$here/../.." && pwd)
venv=$folder/$name
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$folder/extensions-$name
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$work/.datasets TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=

# environment PYTHON INSTALL: a virtual environment made by the function INSTALL, once for each text of that function;
# for names that end in -here the one that is active
environment() {
    local recipe
    recipe=$(declare -f "$2"; "$1" --version)
    if [ "${name##*-}" != here ]; then
        if [ "$(cat "$venv/recipe" 2>/dev/null)" != "$recipe" ]; then
            echo "== making $venv"
            rm -rf "$venv"
            "$1" -m venv "$venv"
            "$2"
            echo "$recipe" > "$venv/recipe"
        fi
        "$venv/bin/pip" install -q -e "$repository"
        export PATH=$venv/bin:$PATH
    fi
    python "$here/make_tiny.py" "$work"
    cd "$work"
    # DeepSpeed 0.18.9 loses weights on a machine without a GPU where it gathers several at once
    cat > zero3.json <<JSON
{
  "zero_optimization": {
    "stage": 3,
    "stage3_gather_16bit_weights_on_model_save": true,
    "stage3_allgather_sequential": true
  },
  "train_micro_batch_size_per_gpu": 1,
  "gradient_accumulation_steps": 1
}
JSON
}

# quietly LOG COMMAND...: its output goes to LOG, and to the terminal if it fails
quietly() {
    local log=$1
    shift
    echo "== $*"
    "$@" > "$log" 2>&1 || { cat "$log"; echo "FAILED: $*" >&2; exit 1; }
}

# refused TEXT COMMAND...: it must fail, and say TEXT
refused() {
    local text=$1
    shift
    echo "== refused: $*"
    if "$@" > refused.log 2>&1; then
        cat refused.log; echo "FAILED: this should have been refused: $*" >&2; exit 1
    fi
    grep -qF -- "$text" refused.log || { cat refused.log; echo "FAILED: no '$text' in the output of $*" >&2; exit 1; }
}

# only_selected BASE ADAPTER MERGED: what compare_checkpoints.py checks
only_selected() {
    python "$here/compare_checkpoints.py" "$1" "$2" "$3"
}
