"""`budwood convert`: a GGUF file as a folder that can be pruned."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood.cli import options
from budwood.cli.terminal import answer, console, working


def convert(
    file: Annotated[str, typer.Argument(metavar="FILE.gguf", help="The file to read; quantised weights are expanded.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the written weights.")
    ] = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Turn a GGUF file into a folder of safetensors.

    \b
    Examples:
      budwood convert SmolLM2-135M-Instruct.Q4_1.gguf ./SmolLM2-135M
      budwood convert model.gguf ./model --dtype bfloat16 --overwrite
    """
    with working():
        from budwood.conversion import convert as turn

        turn(file, target, dtype=dtype, overwrite=overwrite)
    answer({"source": file, "target": target, "dtype": dtype}, json, show)


def show(written: Mapping[str, Any]) -> None:
    console().print(f"written: {written['target']}")
