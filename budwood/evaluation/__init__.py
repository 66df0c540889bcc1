"""Measures models. Every measurement is a frozen record of `reports/results.py`, with its conditions.

`evaluate.evaluate(model, data, against=..., tasks=..., ...) -> tuple[Result, ...]` measures everything that is asked
for and adds it to the report of the folder. `data` is a text, or several as a mapping of names to texts. `paired.py`
compares two models: `paired_loss(a: Perplexity, b: Perplexity) -> Pair`, `paired_score(a: TaskScore, b: TaskScore)`.
"""
