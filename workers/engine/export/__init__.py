"""What is published: a checkpoint that loads without this project, its card and its manifest."""

from workers.engine.export.check import check_checkpoint
from workers.engine.export.checkpoint import staged, versions, write_checkpoint

__all__ = ["check_checkpoint", "staged", "versions", "write_checkpoint"]
