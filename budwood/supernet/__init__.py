"""Pruned copies of every block at several widths, and the search for the widths that change the logits least."""
