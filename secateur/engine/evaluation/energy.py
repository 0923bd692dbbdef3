"""Measure energy where the machine counts it: NVIDIA's NVML on a GPU, Intel's and AMD's RAPL on a CPU."""

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
"""Folder with one ``intel-rapl:N`` for each package, whatever the maker of the processor.

See powercap(4) of the kernel's documentation.
"""


def energy_meter(device: torch.device, rapl: Path = RAPL) -> Callable[[], float] | None:
    """Return a function that returns the joules that the device has used since this call.

    The result is ``None`` where nothing counts the energy, or where this process may not read the counter. The counter
    of a CPU covers the whole package. The counter wraps around; the function notices every wrap if it is called often
    enough, which is once a minute.
    """
    read = _gpu(device) if device.type == "cuda" else _packages(rapl)
    if read is None:
        return None
    first = read()
    return lambda: read() - first


def _gpu(device: torch.device) -> Callable[[], float] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def _packages(rapl: Path) -> Callable[[], float] | None:
    """Return a function that returns the sum of the packages' counters in joules.

    The counters are in microjoules; the sum includes what the counters lost by wrapping around.
    """
    folders = [folder for folder in sorted(rapl.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    try:
        last = [_number(folder / "energy_uj") for folder in folders]
        ranges = [_number(folder / "max_energy_range_uj") for folder in folders]
    except (OSError, ValueError):
        return None
    if not folders:
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for index, folder in enumerate(folders):
            value = _number(folder / "energy_uj")
            total += (value - last[index]) % (ranges[index] + 1)
            last[index] = value
        return total / 1e6

    return read


def _number(file: Path) -> int:
    return int(file.read_text())
