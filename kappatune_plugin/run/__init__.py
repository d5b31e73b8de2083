"""A Recipe in, a trained adapter and its reports out.

`train` is `kappatune sft`, `evaluate` is `kappatune eval`, `launch` starts several processes, `resume` finds the
checkpoint to go on from, `output_dir` says what may be written where, `settings` checks what TRL doesn't, `finish` ends
a run, `auto_budget` grows K while it trains, `diagnosis` says what the run shows.
"""
