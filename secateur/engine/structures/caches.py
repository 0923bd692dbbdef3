"""The numbers by which attention modules find their KV caches."""

from collections import defaultdict
from collections.abc import Sequence

from secateur.engine.model.absent import Absent
from secateur.engine.model.decoder import Decoder


def number_caches(decoder: Decoder) -> None:
    """Give each attention module the number of a cache of its own kind, counting only blocks that have attention.

    Transformers reads the number of cached tokens from the first cache of each kind, so that cache must be in use.
    """
    present = [not isinstance(attention(decoder, index), Absent) for index in range(len(decoder.layers))]
    numbers = cache_numbers(getattr(decoder.model.config, "layer_types", None), present)
    for index, number in numbers.items():
        for module in decoder.layers[index].module.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010 - to a type checker, modules hold only tensors


def cache_numbers(kinds: Sequence[str] | None, present: Sequence[bool]) -> dict[int, int]:
    """Return the number of the cache of each block that has attention.

    ``kinds`` holds the kind of attention of each block (the config's ``layer_types``), or is ``None`` if all are alike;
    ``present`` says which blocks have attention.
    """
    places = defaultdict(list)
    for index in range(len(present)):
        places[kinds[index] if kinds else ""].append(index)
    numbers: dict[int, int] = {}
    for own in places.values():
        numbers.update(zip((index for index in own if present[index]), own, strict=False))
    return dict(sorted(numbers.items()))


def attention(decoder: Decoder, index: int) -> object:
    """Return the attention module of block ``index``, or its stand-in."""
    family = decoder.shape.family
    return decoder.layers[index].module.get_submodule(family.attention_output.partition(".")[0])
