"""The figures of a run, as JSON and as markdown."""
