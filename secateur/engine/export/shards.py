"""Weights in safetensors files: as many files as their size needs, each written before the next one is made."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from secateur.catalog.memory import SHARD_BYTES

METADATA = {"format": "pt"}
"""What transformers requires in each file."""


def write_shards(groups: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """Write the tensors of all ``groups`` into ``folder``, under the file names that transformers and the Hub use.

    A file has at most :data:`SHARD_BYTES`; a tensor that is larger has a file of its own. A group is taken after the tensors of the groups before are in files, except for those of the newest file, so that
    tensors that are computed for a group need not be in memory together.
    """
    files: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0

    def write() -> None:
        nonlocal held, size
        files.append(folder / f".shard-{len(files)}.safetensors")
        save_file(held, files[-1], METADATA)
        held, size = {}, 0

    for group in groups:
        for name, tensor in group.items():
            if held and size + tensor.nbytes > SHARD_BYTES:
                write()
            held[name], places[name] = _whole(tensor), len(files)
            size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    names = [constants.SAFETENSORS_SINGLE_FILE]
    if len(files) > 1:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[place] for name, place in places.items()},
        }
        (folder / constants.SAFETENSORS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    for file, name in zip(files, names, strict=True):
        file.replace(folder / name)


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor in main memory that is its own; a file cannot hold a part of a larger tensor's memory.

    The weights of one expert are such parts.
    """
    tensor = tensor.cpu().contiguous()
    return tensor.clone() if tensor.nbytes < tensor.untyped_storage().nbytes() else tensor
