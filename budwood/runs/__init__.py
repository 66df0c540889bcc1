"""One run of a verb that writes a folder: its recipe, its target, its shards, its report."""
