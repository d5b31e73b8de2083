"""A model in, a KappaReport of its weight matrices out: measured, bounded where that is enough, and cached by content.

`scan` is the way in, `measure` measures many matrices, `lowest` finds the K lowest without measuring all, `cache` knows
what was measured before, `gain` scores matrices by gradients.
"""
