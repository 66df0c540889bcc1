"""A run that writes a model folder: recipe, target, shards, report."""
