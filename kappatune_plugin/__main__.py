"""`python -m kappatune_plugin`, for launchers: `torchrun --nproc_per_node 4 -m kappatune_plugin sft --config ...`."""

import sys

from kappatune_plugin.cli import main

# the launcher `deepspeed` puts it before the command; it says the same in the environment
sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
main()
