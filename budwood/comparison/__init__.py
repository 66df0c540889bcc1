"""Comparisons: a recipe of sources, methods, draws and evaluations, carried out into a folder of results."""
