"""Which weight matrices a model has, and where their values are: in memory, in files, quantized, over ranks.

A model or a path goes into `open_source`, a Source comes out: a list of WeightUnits and a way to load each. `units`
names them, `patterns` chooses among them, `fingerprint` identifies the model.
"""
