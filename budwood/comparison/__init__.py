"""Comparisons: a recipe of sources, methods, draws and evaluations, run one after the other into a folder of results."""
