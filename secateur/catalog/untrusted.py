"""Bounds on the files of a model, which are untrusted input: the sizes of JSON files, and the values of a config.

Every number of a config is bounded before anything is built from it, because numbers determine memory and time.
"""

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.contract.errors import ErrorCode, PruningError

LARGEST_JSON = 64 * 2**20
MOST_DEPTH = 32
"""Largest depth of a JSON file's objects and lists within each other."""
MOST_VALUES = 200_000
"""Largest number of values in a config; the largest published ones map thousands of labels to numbers."""
LARGEST_NUMBER = 2**24
"""A bound beyond the sizes of all models."""
LARGEST_BASE = 2**53
"""Largest whole number that stands for a quantity, such as the base of rotary embeddings; floats hold it exactly."""
BASES = re.compile(r"theta|base|scal")
"""Keys of whole numbers that are quantities and not counts."""
LIMITS = re.compile(r"_limit$")
"""Keys of limits, which may be infinite."""
MOST_LAYERS = 1024
LAYERS = re.compile(r"^(n|num)_(\w+_)?layers?$")
"""Keys of numbers of layers; each layer becomes modules."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
COUNTS = re.compile(r"^(n|num|max)_|(?<!chunk)_size$|(^|_)(head|ffn|proj)_dim$")
"""Keys of counts."""
OBJECTS = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
LISTS = ("architectures", "layer_types", "mlp_only_layers")
TEXTS = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rope_type",
    "type",
    "dtype",
    "torch_dtype",
)
NUMBERS = ("partial_rotary_factor", "query_pre_attn_scalar", "rope_ratio")


def read_json(path: Path) -> Any:
    """Read a JSON file of at most :data:`LARGEST_JSON` bytes and of at most :data:`MOST_DEPTH` levels.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file cannot be read.
        ValueError: The file is no regular file, is not JSON, is too large, or is nested too deeply.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise ValueError("it is no regular file")
    if status.st_size > LARGEST_JSON:
        raise ValueError(f"it has {status.st_size} bytes, more than {LARGEST_JSON}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [inner for value in level for inner in _parts(value)]
    if level:
        raise ValueError(f"it is nested too deeply; allowed: {MOST_DEPTH} levels")
    return found


def _parts(value: Any) -> Iterator[Any]:
    """Yield the objects and lists that lie directly in ``value``."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, dict | list))


def check_values(config: Mapping[str, Any], file: str = "config.json") -> None:
    """Check the type and the size of all values of a config, at every level.

    Counts, such as sizes and numbers of layers, are whole numbers from 0 to :data:`LARGEST_NUMBER`, or lists of them.
    Any other whole number has at most this magnitude, and every number is finite. The keys that this project reads have
    the type that it expects. ``file`` is the name of the config's file in the message.

    Raises:
        PruningError: ``config_invalid``; the message names the key, the value and what is allowed.
    """
    left = MOST_VALUES
    open_values: list[tuple[str, str, Any]] = [("", "", dict(config))]
    while open_values:
        path, key, value = open_values.pop()
        if (allowed := _allowed(key, value)) is not None:
            raise PruningError(
                ErrorCode.CONFIG_INVALID,
                f"{file}: '{path}' must be {allowed}, not {shown(value)}.",
                field="model_id",
            )
        inner: list[tuple[str, str, Any]] = []
        if isinstance(value, Mapping):
            inner = [(f"{path}.{name}" if path else str(name)[:100], str(name), part) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            inner = [(path, "" if key in LISTS else key, part) for part in value]
        left -= len(inner)
        if left < 0:
            raise PruningError(
                ErrorCode.CONFIG_INVALID,
                f"{file} has too many values; allowed: {MOST_VALUES:,}.",
                field="model_id",
            )
        open_values += inner


def shown(value: Any) -> str:
    """Return a value as error messages show it: at most 40 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "a longer number"  # its digits may be more than Python writes
    text = repr(value if not isinstance(value, Mapping | list | tuple) or len(value) < 10 else type(value).__name__)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _allowed(key: str, value: Any) -> str | None:
    """Return what is allowed for ``key`` if ``value`` is not, else ``None``."""
    if value is None:
        return None
    if key in OBJECTS:
        return None if isinstance(value, Mapping) else "an object"
    if key in LISTS:
        return None if isinstance(value, list | tuple) else "a list"
    if key in TEXTS:
        return None if isinstance(value, str) else "text"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in NUMBERS and not number:
        return "a number"
    if isinstance(value, Mapping | list | tuple):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None if LIMITS.search(key) and value == math.inf else "a finite number"
    if COUNTS.search(key):
        fewest = 1 if key in DEPTHS else 0
        most = MOST_LAYERS if LAYERS.search(key) else LARGEST_NUMBER
        return None if number and fewest <= value <= most else f"an integer from {fewest} to {most}"
    if isinstance(value, int) and number:
        most = LARGEST_BASE if BASES.search(key) else LARGEST_NUMBER
        return None if abs(value) <= most else f"a number from {-most} to {most}"
    return None
