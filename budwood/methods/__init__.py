"""Pruning methods, one file each; `registry.py` lists them."""

from budwood.methods.expression import parse_method
from budwood.methods.method import Method, write_method
from budwood.methods.registry import METHODS

__all__ = ["METHODS", "Method", "parse_method", "write_method"]
