"""A weight matrix in, its condition number with a certified interval out. Knows no model and no file.

Start at `number`, for one matrix, or `batched`, for a stack of equal shapes on a GPU. `exact` and `by_factors` are the
two ways to measure, `null_condition` gives a random matrix's value, `signal_to_noise` Spectrum's criterion.
"""
