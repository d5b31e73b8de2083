"""`python -m kappatune_plugin`, for launchers: `torchrun --nproc_per_node 4 -m kappatune_plugin sft --config ...`."""

from kappatune_plugin.cli import main

main()
