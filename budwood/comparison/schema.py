"""The fields of a recipe, checked by pydantic: no field that is not here, no value of another type."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Bos = Literal["auto", "every", "none"]
Positive = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]  # of a window in tokens


class Part(BaseModel):
    """Fields are checked when it is made and cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceFields(Part):
    """A dense model: a folder, a name on the hub, or `smollm2`, which is converted from its package once."""

    model: str
    trust_remote_code: bool = False


class CalibrationFields(Part):
    """The calibration text, as the options of `budwood prune`."""

    data: str | None = None
    num_samples: Positive = 128
    seq_length: Length = 2048
    sampling: Literal["random", "consecutive"] = "random"
    bos: Bos = "auto"


class PruneFields(Part):
    """How models are written and computed, as the options of `budwood prune`."""

    format: str = "auto"
    values: Literal["int8", "int4"] | None = None
    dtype: Dtype | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    sparse_products: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "fused", "blocked"] = "auto"
    device: str = "auto"
    skip: list[str] = []
    activation_memory: str = "4GB"


class MethodFields(Part):
    """A row of the recipe. calibration, prune: single fields that differ from those of the recipe."""

    method: str
    name: Name | None = None
    sources: list[str] | None = None
    draws: Positive | list[int] | None = None
    calibration: dict[str, Any] = {}
    prune: dict[str, Any] = {}


class TextFields(Part):
    """A text for perplexity, as the options of `budwood evaluate`."""

    data: str
    variant: Literal["plain", "gptq", "c4-random"] = "plain"
    seq_length: Length = 2048
    limit: Positive | None = None
    bos: Bos = "auto"
    seed: int = 0


class TaskFields(Part):
    """Zero-shot tasks of lm-evaluation-harness. data: where their rows come from; by default what is found."""

    names: Annotated[list[str], Field(min_length=1)]
    data: str | None = None
    limit: Positive | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    batch_size: Positive = 4


class DivergenceFields(Part):
    """KL divergence from the dense model. texts: names of those to measure it on; by default all."""

    texts: list[str] | None = None
    limit: Positive | None = None


class RepetitionFields(Part):
    """Repeated 4-grams in greedy continuations. text: whose windows begin them; by default the first."""

    text: str | None = None
    prompt: Length = 32
    new: Positive = 128
    continuations: Positive = 32


class EvaluateFields(Part):
    """What is measured on every model."""

    texts: dict[Name, TextFields] = {}
    tasks: TaskFields | None = None
    divergence: DivergenceFields | None = None
    repetition: RepetitionFields | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    stream: bool = False


class SpeedFields(Part):
    """`budwood bench` of every pruned model against its dense one."""

    rows: Annotated[list[Positive], Field(min_length=1)] = [1, 64]
    threads: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class RecipeFields(Part):
    """A whole recipe."""

    title: Name
    description: str = ""
    variables: dict[Name, str | int | float | bool | None] = {}
    sources: Annotated[dict[Name, SourceFields], Field(min_length=1)]
    calibration: CalibrationFields = CalibrationFields()
    draws: Positive | list[int] = 1
    prune: PruneFields = PruneFields()
    methods: Annotated[list[MethodFields], Field(min_length=1)]
    evaluate: EvaluateFields = EvaluateFields()
    speed: SpeedFields | None = None
    keep_models: bool = True
    published: list[str] = []
