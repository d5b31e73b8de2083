"""Processes that work together. The one room that knows DeepSpeed and DTensor.

`ranks` is who runs, `shards` where a divided weight is, `work` who measures what, `lost_ranks` what happens when one
dies, `unsupported` what doesn't work in which mode.
"""
