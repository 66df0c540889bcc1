"""Fitting of a block's weights by gradients."""
