"""While a module runs, its weight is an alias whose gradient goes to the selected slices of it.

`bind` puts it there and takes it away. `alias` is the one for any weight; `weight` the one for fused experts, which
knows how they are read and has `gradients` compute those of the slices alone. A module, one of its parameters and what
is trained of it come in; the parameter itself stays frozen and where it is.
"""
