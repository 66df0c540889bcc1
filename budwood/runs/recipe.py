"""The recipe of a run: everything that determines the bytes of its folder, stored there as `recipe.json`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from budwood.checkpoints.sidecars import read_object
from budwood.environment import installed
from budwood.errors import UsageError

FILE = "recipe.json"
# What makes two runs the same; where a value has a digest, the digest decides (names and paths may differ).
IDENTITY = ("budwood", "verb", "method", "source", "data", "dtype", "asked", "format", "skip", "training")
ARITHMETIC = ("compute_dtype", "sparse_products", "attention")  # options that say how to compute, or "auto"
REQUIRED = ("method", "source", "data", "dtype", "format")
NONE = type(None)
TYPES: dict[str, tuple[type, ...]] = {
    "method": (str, NONE),
    "source": (dict,),
    "data": (dict, NONE),
    "dtype": (str,),
    "format": (str,),
    "skip": (list,),
    "verb": (str,),
    "asked": (dict,),
    "arithmetic": (dict,),
    "made_from": (dict, NONE),
    "training": (dict, NONE),
    "budwood": (str, NONE),
}
INNER_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "source": {"name": (str,), "sha256": (str,), "content": (str,)},
    "data": {
        "data": (str,),
        "num_samples": (int,),
        "seq_length": (int,),
        "sampling": (str,),
        "seed": (int,),
        "bos": (str,),
        "sha256": (str,),
    },
    "asked": dict.fromkeys(ARITHMETIC, (str,)),
    "arithmetic": {"computed_in": (str,), "sparse_products": (bool,), "blocked_attention": (bool,), "device": (str,)},
}
# As versions wrote it that kept the arithmetic flat.
FLAT = ("computed_in", "sparse_products", "blocked_attention")


@dataclass(frozen=True)
class Recipe:
    """JSON-plain values only. Fields that this version does not know are kept in `unknown`.

    source: name and sha256; of a finished run also content, the digest of all that its files hold. data: the record
    of the calibration windows, None without calibration. asked: the arithmetic options as the user gave them.
    arithmetic: what was chosen on this machine; a resumed run continues with it. made_from: the recipe of the folder
    that this one was made from. training: the options of `retrain`.
    """

    method: str | None
    source: dict[str, Any]
    data: dict[str, Any] | None
    dtype: str
    format: str
    skip: list[str] = field(default_factory=list)
    verb: str = "prune"
    asked: dict[str, str] = field(default_factory=dict)
    arithmetic: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    budwood: str | None = field(default_factory=lambda: installed("budwood"))
    unknown: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        known = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "unknown"}
        if self.training is None:
            del known["training"]
        return {**self.unknown, **known}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path) -> "Recipe":
        """Raises UsageError where a field is missing or of another type."""
        values = _as_written_now(content)
        known = {name.name for name in fields(cls)} - {"unknown"}
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise UsageError(f"{where} lacks {missing[0]!r}, so it is no recipe of budwood; give a recipe.json")
        _check_types(values, TYPES, where, "")
        for name, types in INNER_TYPES.items():
            _check_types(values.get(name) or {}, types, where, f"{name}.")
        for pattern in values.get("skip", []):
            _check_types({"skip": pattern}, {"skip": (str,)}, where, "an entry of ")
        unknown = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: value for name, value in values.items() if name in known}, unknown=unknown)

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The arithmetic of a run that began; None where it was not chosen yet, or not kept."""
        return self.arithmetic if "computed_in" in self.arithmetic else None

    def with_arithmetic(self, arithmetic: Mapping[str, Any]) -> "Recipe":
        return replace(self, arithmetic=dict(arithmetic))

    def with_content(self, content: str) -> "Recipe":
        return replace(self, source={**self.source, "content": content})

    def difference(self, other: "Recipe") -> str | None:
        """The first difference to `other`, as a sentence; None where both are the same run."""
        for key in IDENTITY:
            mine, theirs = getattr(self, key), getattr(other, key)
            if key == "asked":
                found = next((name for name in ARITHMETIC if _asked(mine, name) != _asked(theirs, name)), None)
                if found:
                    words = found.replace("_", " ")
                    return f"its {words} is {_asked(mine, found)}, asked for is {_asked(theirs, found)}"
            elif _digest_of(mine) != _digest_of(theirs):
                return f"its {key} is {_short(_short_source(mine))}, asked for is {_short(_short_source(theirs))}"
        return None

    @property
    def id(self) -> str:
        """Digest of all that identifies the run, arithmetic included; every shard stores it."""
        parts = [_digest_of(getattr(self, key)) for key in IDENTITY if key not in ("asked", "training")]
        if self.training is not None:
            parts.append(self.training)
        return hashlib.sha256(json.dumps([*parts, self.arithmetic], sort_keys=True).encode()).hexdigest()[:32]


def read_recipe(file: Path) -> Recipe | None:
    """The recipe in a file; None where there is no such file. Raises UsageError where it is none."""
    content = read_object(file, {}, "so it is no recipe; give another folder, or --overwrite", UsageError)
    return None if content is None else Recipe.from_json(content, file)


def recipe_options(file: str | Path) -> dict[str, Any]:
    """The options of `prune` that make the folder of a recipe again, arithmetic included: `prune(S, T, **options)`.

    Raises UsageError where the file is no recipe, or one of another verb.
    """
    path = Path(file).expanduser()
    path = path / FILE if path.is_dir() else path
    recipe = read_recipe(path)
    if recipe is None:
        raise UsageError(f"there is no recipe {path}; give the recipe.json of a folder that budwood prune wrote")
    if recipe.verb != "prune" or recipe.method is None or recipe.made_from is not None:
        raise UsageError(f"{path} is the recipe of a folder that was not made by prune; give that of a pruned folder")
    arithmetic = recipe.arithmetic
    options: dict[str, Any] = {
        "method": recipe.method,
        "dtype": recipe.dtype,
        "format": recipe.format,
        "skip": list(recipe.skip),
        "compute_dtype": arithmetic.get("computed_in", "auto"),
        "sparse_products": _switch(arithmetic.get("sparse_products"), "on", "off"),
        "attention": _switch(arithmetic.get("blocked_attention"), "blocked", "fused"),
        "device": arithmetic.get("device", "auto"),
        "like": recipe,
    }
    if recipe.data is not None:
        names = ("num_samples", "seq_length", "sampling", "seed", "bos")
        options |= {name: recipe.data[name] for name in names if name in recipe.data}
        options["data"] = recipe.data.get("data")
    return options


def _as_written_now(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe of an earlier version under the names that this one writes."""
    values = dict(content)
    if "asked" not in values and "arithmetic" not in values:
        if "compute_dtype" in values:
            values["asked"] = {"compute_dtype": values.pop("compute_dtype")}
        values["arithmetic"] = {name: values.pop(name) for name in FLAT if name in values}
    if "repacked" in values:
        values["made_from"] = values.pop("repacked")
        values.setdefault("verb", "export")
    return values


def _check_types(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: Path, prefix: str) -> None:
    """Raises UsageError where a value is of a type that JSON written by budwood never has there."""
    for name, allowed in types.items():
        if name in values and type(values[name]) not in allowed:
            raise UsageError(
                f"{where}: {prefix}{name} is {_short(values[name])}, which is of the wrong type; give the recipe.json "
                "as budwood wrote it"
            )


def _switch(value: bool | None, on: str, off: str) -> str:
    return "auto" if value is None else on if value else off


def _asked(asked: Mapping[str, str], name: str) -> str:
    return str(asked.get(name, "auto"))


def _digest_of(value: Any) -> Any:
    return value.get("sha256", value) if isinstance(value, dict) else value


def _short_source(value: Any) -> Any:
    """Without the digest that only a finished run has."""
    return {name: each for name, each in value.items() if name != "content"} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 160 else text[:157] + "..."
