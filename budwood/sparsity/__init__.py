"""Pure tensor mathematics on one matrix at a time: statistics, scores, patterns, solvers."""
