"""Fitting by gradients: the parts of a block that may move, against targets."""
