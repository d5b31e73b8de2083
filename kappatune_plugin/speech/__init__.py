"""Recordings and transcripts in; batches to train on, and how many words a model hears wrong, out.

`settings` is the block `audio:` of a recipe, `recordings` reads and resamples files, `collator` makes batches of them,
`word_errors` transcribes and counts, `compose` puts a speech encoder before a text model.
"""
