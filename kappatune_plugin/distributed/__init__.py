"""Several processes on one model. The only room that knows DeepSpeed and DTensor.

`ranks`: which process this is and how they exchange objects; `shards`: where a divided weight is; `work`: who measures
what; `lost_ranks`: errors when a process dies; `unsupported`: errors for modes of training that can't work.
"""
