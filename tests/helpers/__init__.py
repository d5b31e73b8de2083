"""What several tests use: tiny models, recipes, slow obvious references, made-up reports, ranks on one machine."""
