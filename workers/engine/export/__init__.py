"""What is published: a checkpoint that loads without this project, its card and its manifest."""

from workers.engine.export.check import check_checkpoint
from workers.engine.export.checkpoint import check_room, staged, versions, write_checkpoint

__all__ = ["check_checkpoint", "check_room", "staged", "versions", "write_checkpoint"]
