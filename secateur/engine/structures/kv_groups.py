"""KV groups: a key-value head with every query head that reads it, so that what is left is a regular attention."""

from secateur.catalog.architectures import Family
from secateur.engine.model.decoder import Layer
from secateur.engine.structures.base import Width


class KVGroups(Width):
    name = "kv_groups"
    part = "attention"
    single = False

    def input_names(self, family: Family) -> tuple[str, ...]:
        return family.attention_inputs

    def output_name(self, family: Family) -> str:
        return family.attention_output

    def width(self, layer: Layer) -> int:
        return layer.group_width
