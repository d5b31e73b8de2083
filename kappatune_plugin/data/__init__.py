"""Files and hub names in, examples out: rows, templates, and pairs of prompt and completion.

`rows` loads data sets, `templates` reads "Tweet: {text}", `examples` turns rows into training and test examples.
"""
