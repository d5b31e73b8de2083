"""A model in, a KappaReport of its weight matrices out: measured, only bounded where that is enough, cached by content.

Start at `scan`. `measure` measures many matrices, `lowest` finds the K lowest without measuring all, `cache` keeps
earlier results, `gain` scores matrices by gradients.
"""
