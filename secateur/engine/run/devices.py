"""Where a run places its model: on one device, on several, or streamed from the host, by what fits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from secateur.catalog.architectures import ModelShape
from secateur.catalog.memory import Place, check_fits, estimate, streams
from secateur.catalog.resolve import Resolved
from secateur.engine.model.layer_files import LayerFiles
from secateur.engine.model.placement import Placement, Sharded, Streamed
from secateur.engine.run.workspace import Workspace

ROOM = 0.9
"""Share of a device's free memory that the estimate may take."""


def choose_placement(
    resolved: Resolved, shape: ModelShape, workspace: Workspace, scratch: Path
) -> Callable[[], Placement]:
    """Return a function that makes the placement of each model of the run.

    A model stays on its device where the estimate of its memory fits into what the device has free, or into the
    workspace's ``device_memory_bytes``. Else its layers are spread over all GPUs, where these can hold them together, or
    are streamed from the host. On a CPU without such a limit, the kernel reads layers from their files.

    Raises:
        PruningError: ``out_of_memory`` where no placement fits.
    """
    device = torch.device(workspace.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    files, given = LayerFiles(scratch), workspace.device_memory_bytes
    if device.type == "cpu" and given is None:
        return partial(Placement, device, files)
    on_cpu = device.type == "cpu"
    free = given or round(ROOM * torch.cuda.mem_get_info(device)[0])
    resident = estimate(resolved, shape, Place.RESIDENT)
    if resident.total <= free:
        return partial(Placement, device, files if on_cpu else None)
    if device.index is None and not on_cpu and (count := torch.cuda.device_count()) > 1:
        rest = [round(ROOM * torch.cuda.mem_get_info(index)[0]) for index in range(count)]
        if resident.weights / count + resident.working <= min(rest):
            return partial(Sharded, [torch.device("cuda", index) for index in range(count)])
    if streams(resolved):
        check_fits(resolved, estimate(resolved, shape, Place.STREAMED), free)
        return partial(Streamed, device, files)
    check_fits(resolved, resident, free)  # which raises
    raise AssertionError
