"""Options that several verbs share, each with one spelling and one help text."""

from typing import Annotated, Literal

import typer

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of safetensors, or a name on the hub.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, dense or pruned, or a name on the hub.")]
METHOD = typer.Option(
    "--method", "-m", metavar="EXPR", help="The method, such as 'wrp(alpha=0.25)' or 'wanda(\"2:4\")'."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the contents of the target folder.")]
Bos = Annotated[
    Literal["auto", "every", "none"],
    typer.Option(help="BOS token: where the tokenizer puts it in the whole text, before every window, or none."),
]
SeqLength = Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Tokens per window.")]
NumSamples = Annotated[int, typer.Option(min=1, metavar="WINDOWS", help="Number of calibration windows.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="REGEX", help="Do not prune matrices whose full name matches; may be repeated."),
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="How pruned matrices are stored: auto (the smallest), dense, bitmask, two_four, two_four_csr, "
        "two_four_compact or two_four_ell.",
    ),
]
Values = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        help="int8, int4: kept weights as integers of 8 or 4 bits with scales (recovered weights of 2:4 are not "
        "rounded); by default all have the dtype of the written weights."
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run model code that comes with the model; without it none is run."),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N.")
]
DtypeName = Literal["float32", "bfloat16", "float16"]
StoredDtype = Annotated[
    DtypeName | None, typer.Option("--dtype", help="Dtype of the written weights; by default that of SOURCE.")
]
ComputeDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Dtype of the forward pass."),
]
