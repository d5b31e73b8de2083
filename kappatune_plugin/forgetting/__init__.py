"""What a model still knows, measured: texts, examples and a model in, a ForgettingReport out.

`config` is the block `forgetting:` of a recipe, `measures` the losses and accuracies, `answers` and `harness` what is
measured by generating and by lm-eval, `probe` all of them at once, `callback` the same while a Trainer trains.
"""
