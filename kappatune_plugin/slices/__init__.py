"""While a module runs, its weight is an alias whose gradient goes to the selected slices of it.

`bind` puts it there and takes it away, `alias` hands the gradient on. A module, one of its parameters and what is
trained of it come in; the parameter itself stays frozen and where it is.
"""
