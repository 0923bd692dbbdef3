"""Feed-forward channels: a row of each input projection with its column of the output projection."""

from secateur.catalog.architectures import Family
from secateur.engine.model.decoder import Layer
from secateur.engine.structures.base import Width


class Channels(Width):
    name = "channels"
    part = "feed_forward"
    single = True

    def input_names(self, family: Family) -> tuple[str, ...]:
        return family.channel_inputs

    def output_name(self, family: Family) -> str:
        return family.channel_output

    def width(self, layer: Layer) -> int:
        return 1

    def experts(self, layer: Layer) -> int:
        return 1 if layer.mixture is None else layer.mixture.count
