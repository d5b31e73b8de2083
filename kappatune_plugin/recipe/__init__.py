"""A recipe in, a Recipe out: TRL's own dataclasses and the blocks of this package, checked before anything is loaded.

`text` reads the YAML, `trl_keys` knows TRL's keys, `blocks` ours, `launch_keys` those of `accelerate launch`; `recipe`
puts them together. `load_model`, `load_rows` and `measure_on_rows` load what a recipe names.
"""
