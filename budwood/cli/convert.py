"""`budwood convert`: a GGUF file as a folder that can be pruned."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from budwood.cli import options
from budwood.cli.checks import check_gguf
from budwood.cli.terminal import console, print_result, stdout_to_stderr


def convert(
    file: Annotated[str, typer.Argument(metavar="FILE.gguf", help="The file; quantised weights are dequantised.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Dtype of the written weights.")
    ] = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Convert a GGUF file to a folder of safetensors.

    \b
    Examples:
      budwood convert SmolLM2-135M-Instruct.Q4_1.gguf ./SmolLM2-135M
      budwood convert model.gguf ./model --dtype bfloat16 --overwrite
    """
    with stdout_to_stderr():
        check_gguf(file)
        from budwood import conversion

        conversion.convert(file, target, dtype=dtype, overwrite=overwrite)
    print_result({"source": file, "target": target, "dtype": dtype}, json, show)


def show(result: Mapping[str, Any]) -> None:
    console().print(f"written: {result['target']}")
