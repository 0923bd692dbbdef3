"""Energy, where the machine counts it: NVIDIA's NVML on a GPU, Intel's and AMD's RAPL on a CPU."""

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
"""See powercap(4) of the kernel's documentation: one ``intel-rapl:N`` a package, whatever the processor's maker."""


def energy_meter(device: torch.device, rapl: Path = RAPL) -> Callable[[], float] | None:
    """Joules that the device has taken since the meter was made; ``None`` where nothing counts them (or lets us read it).

    The counter of a CPU is the whole package's; it wraps around, which is seen if it is read often enough: every minute.
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
    """Sums the packages' counters, in microjoules, and what they lost by wrapping."""
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
