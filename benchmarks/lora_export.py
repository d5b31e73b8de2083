"""How far the nearest LoRA adapter is from what was trained, by rank: the table in docs/export.md.

python benchmarks/lora_export.py ADAPTER, the output_dir of a run; its base has to be where the adapter says.
"""

import sys
from pathlib import Path
from statistics import median

import torch

from kappatune_plugin.export.lora import changes_of
from kappatune_plugin.export.merge import load_tuned
from kappatune_plugin.tuner.adapter_folder import adapter_config

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main(adapter: Path) -> None:
    """Print the smallest, median and largest relative error (Frobenius) over the trained matrices at each rank."""
    config = adapter_config(adapter)
    changes = changes_of(load_tuned(adapter, config.base_model_name_or_path, config, {}))
    matrices = [matrix for change in changes.values() for matrix in change.reshape(-1, *change.shape[-2:])]
    spectra = [torch.linalg.svdvals(matrix) for matrix in matrices]
    spectra = [sigma for sigma in spectra if sigma.any()]
    print("| rank | smallest | median | largest |\n|---|---|---|---|")
    for rank in RANKS:
        errors = [float(sigma[rank:].norm() / sigma.norm()) for sigma in spectra]
        print(f"| {rank} | {min(errors):.1%} | {median(errors):.1%} | {max(errors):.1%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
