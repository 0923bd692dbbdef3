"""A picture of the units that each layer keeps, for the model card."""

from pathlib import Path

from secateur.contract.report import WidthChange

PANELS = {"heads": "attention heads", "channels": "feed-forward channels"}
GONE, LEFT = "#d9d9d9", "#2f7d4f"


def draw_widths(widths: WidthChange, path: Path) -> None:
    """Write a PNG of each layer's heads and feed-forward channels, before and after pruning.

    The function needs matplotlib, of the extra ``eval``.
    """
    from matplotlib.figure import Figure

    layers = [layer.layer for layer in widths.before]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, (key, title) in zip(figure.subplots(2, 1, sharex=True), PANELS.items(), strict=True):
        panel.bar(layers, [getattr(layer, key) for layer in widths.before], color=GONE, label="removed")
        panel.bar(layers, [getattr(layer, key) for layer in widths.after], color=LEFT, label="left")
        panel.set_ylabel(title)
        panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("layer")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    # without the software's name, equal reports give equal bytes
    figure.savefig(path, dpi=120, metadata={"Software": None})
