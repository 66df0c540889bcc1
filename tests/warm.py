"""What most commands import, for `processes.py`: imported once, then every process is forked from there."""

from budwood.cli.terminal import stdout_to_stderr

with stdout_to_stderr():  # as in a command: libraries read on import how much they may print
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401

    import budwood.autoload
    import budwood.benchmarking
    import budwood.cli
    import budwood.pruning
    import budwood.repacking  # noqa: F401
