"""A weight matrix in, its condition number with a certified interval out. Knows no model and no file.

`number` is the way in, for one matrix; `batched` for a stack of equal shapes on a GPU. `exact` and `by_factors` are the
two ways to measure, `null_condition` the value by chance, `signal_to_noise` Spectrum's criterion.
"""
