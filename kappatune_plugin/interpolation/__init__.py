"""A model, what training changed in it and texts in; the scale of each change that keeps a limit of forgetting out.

`find_changes` finds what was trained, `change` scales it, `texts` measures and says how sure that is, `one_scale` and
`per_matrix` choose, `dial` chooses and verifies, `plot` draws it. Only `find_changes` knows adapters.
"""
