"""Export: a checkpoint that loads without this project, its model card, and its manifest."""

from secateur.engine.export.check import check_checkpoint, run_check
from secateur.engine.export.checkpoint import (
    check_room,
    fits_stock_class,
    staged,
    versions,
    write_manifest,
    write_model,
)

__all__ = [
    "check_checkpoint",
    "check_room",
    "fits_stock_class",
    "run_check",
    "staged",
    "versions",
    "write_manifest",
    "write_model",
]
