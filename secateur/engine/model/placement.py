"""Where the layers of a model live: on the device that runs them, on several devices, or in the host's memory.

Everything else of a model, such as its embeddings and its head, is on the placement's ``device``.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.engine.model.layer_files import LayerFiles

CROWDING = 0.03
"""Share of a device's free memory from which one set of hidden states is kept on the host; a stream of layers has three sets."""


class Placement:
    """The placement in which every layer stays on ``device``; the other placements are its subclasses.

    ``files`` hold the changed layers of a model on a CPU; without them, changed layers stay in memory.
    """

    def __init__(self, device: torch.device, files: LayerFiles | None = None) -> None:
        self.device = device
        self._files = files

    def place(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Move ``model``, of which ``layers`` are the decoder layers, to where this placement has it."""
        model.to(self.device)

    @contextmanager
    def at_hand(self, layer: nn.Module) -> Iterator[None]:
        """Keep ``layer`` on the device that runs it while the context lasts; the context may change its tensors."""
        yield
        if self._files is not None:
            self._files.tidy()

    def hold(self, layer: nn.Module) -> None:
        """Take note that the tensors of ``layer`` changed."""
        if self._files is not None:
            self._files.hold(layer)

    def store(self, size: int) -> torch.device:
        """Return where ``size`` bytes of hidden states are kept: the device, or the host where they would crowd the device."""
        if self.device.type != "cuda":
            return self.device
        free = torch.cuda.mem_get_info(self.device)[0]
        return self.device if size < CROWDING * free else torch.device("cpu")

    def __str__(self) -> str:
        return str(self.device)


class Sharded(Placement):
    """Layers on several devices, in order; hidden states hop to a layer's device and back to the first device."""

    def __init__(self, devices: Sequence[torch.device], move: Callable[[Any, torch.device], Any] | None = None) -> None:
        """Use ``devices``, of which the first has the embeddings and the head; ``move`` moves what a layer gets."""
        super().__init__(devices[0])
        self._devices = devices
        self._move = move or _moved

    def place(self, model: nn.Module, layers: nn.ModuleList) -> None:
        _move_rest(model, layers, self.device)
        sizes = [_size(layer) for layer in layers]
        rest = sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes)
        passed = float(rest)
        share = (rest + sum(sizes)) / len(self._devices)
        for layer, size in zip(layers, sizes, strict=True):
            passed += size
            own = self._devices[min(int((passed - size / 2) / share), len(self._devices) - 1)]
            layer.to(own)
            layer.register_forward_pre_hook(partial(self._enter, own), with_kwargs=True)
            layer.register_forward_hook(lambda module, given, output: self._move(output, self.device))

    def _enter(self, own: torch.device, module: nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
        return self._move(given, own), self._move(named, own)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self._devices))} (layers spread over {len(self._devices)} devices)"


@dataclass
class _Copy:
    """A layer's tensors on the device: what is in the module's place of each tensor, and the tensor on the host."""

    tensors: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    """By the identity of the host's parameter: the host's parameter, and the device's."""
    versions: dict[int, int] = field(default_factory=dict)
    """By the identity of a parameter: how often it had been changed in place when the copy was made."""
    ready: Any = None
    """The CUDA event after which the copy is complete, or ``None`` on other devices."""


class Streamed(Placement):
    """Layers in the host's memory or its files, of which the device has the one that runs and the one that comes next.

    The next layer is the one above or below the layer that runs, whichever way the last two went. It is copied by a
    thread, and on CUDA from pinned memory in a stream of its own. Only layers that are not trained can be streamed.
    """

    def __init__(self, device: torch.device, files: LayerFiles | None = None) -> None:
        super().__init__(device, files)
        self._layers: list[nn.Module] = []
        self._coming: dict[int, Future[_Copy]] = {}
        self._here: dict[int, _Copy] = {}
        self._kept: Counter[int] = Counter()
        self._last, self._step = -1, 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.most_bytes = 0
        """Largest number of bytes of layers that the device has had at once."""

    def place(self, model: nn.Module, layers: nn.ModuleList) -> None:
        _move_rest(model, layers, self.device)
        self._layers = list(layers)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(lambda module, given, index=index: self._begin(index))
            layer.register_forward_hook(lambda module, given, output, index=index: self._end(index), always_call=True)

    @contextmanager
    def at_hand(self, layer: nn.Module) -> Iterator[None]:
        index = next(number for number, each in enumerate(self._layers) if each is layer)
        self._kept[index] += 1
        try:
            self._begin(index)
            yield
        finally:
            self._kept[index] -= 1
            self._end(index)

    def hold(self, layer: nn.Module) -> None:
        if not any(self._layers[index] is layer for index in self._here):
            super().hold(layer)  # otherwise it is held when it leaves the device

    def __str__(self) -> str:
        return f"{self.device} (layers streamed from the host)"

    def _begin(self, index: int) -> None:
        """Put the layer's tensors on the device in the place of the host's, and begin to copy the next layer."""
        if index in self._here:
            return
        found = self._ask(index).result()
        if not _is_fresh(found, self._layers[index]):
            found = self._copy(index)
        del self._coming[index]
        if found.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(found.ready)
            for _, there in found.tensors.values():
                there.record_stream(torch.cuda.current_stream(self.device))
        self._here[index] = found
        _replace(self._layers[index], {key: there for key, (_, there) in found.tensors.items()})
        if abs(index - self._last) == 1 and self._last >= 0:
            self._step = index - self._last
        self._last = index
        following = index + self._step
        for other in [number for number in self._coming if number != following]:
            del self._coming[other]
        if 0 <= following < len(self._layers) and following not in self._here:
            self._ask(following)
        present = chain.from_iterable(each.tensors.values() for each in self._here.values())
        coming = _size(self._layers[following]) if following in self._coming else 0
        self.most_bytes = max(self.most_bytes, coming + sum(there.nbytes for _, there in present))

    def _end(self, index: int) -> None:
        """Put the host's tensors back, unless someone keeps the layer; what changed goes to the host."""
        if self._kept[index] or index not in self._here:
            return
        gone, layer = self._here.pop(index), self._layers[index]
        back = {id(there): here for here, there in gone.tensors.values() if there._version == gone.versions[id(there)]}
        changed = {
            id(own): nn.Parameter(own.detach().cpu(), requires_grad=False)
            for own in layer.parameters()
            if id(own) not in back and not own.requires_grad
        }
        _replace(layer, back | changed)
        if changed:
            self.hold(layer)

    def _ask(self, index: int) -> "Future[_Copy]":
        if index not in self._coming:
            self._coming[index] = self._thread.submit(self._copy, index)
        return self._coming[index]

    def _copy(self, index: int) -> _Copy:
        copy = _Copy()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for here in self._layers[index].parameters():
                if here.requires_grad or id(here) in copy.tensors:
                    continue
                source = here.detach() if self._stream is None else here.detach().pin_memory()
                there = nn.Parameter(source.to(self.device, non_blocking=True, copy=True), requires_grad=False)
                copy.tensors[id(here)] = here, there
                copy.versions |= {id(each): each._version for each in (here, there)}
            if self._stream is not None:
                copy.ready = torch.cuda.Event()
                copy.ready.record(self._stream)
        return copy


def _is_fresh(copy: _Copy, layer: nn.Module) -> bool:
    """Return whether the layer still has the tensors that were copied, unchanged."""
    return all(
        id(own) in copy.tensors and copy.versions[id(own)] == own._version
        for own in layer.parameters()
        if not own.requires_grad
    )


def _replace(module: nn.Module, others: dict[int, nn.Parameter]) -> None:
    """Put other parameters in the place of those whose identities ``others`` has."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and id(parameter) in others:
                owner._parameters[name] = others[id(parameter)]


def _move_rest(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Move everything of ``model`` to ``device`` except for the parameters of ``layers``."""
    inside = {id(parameter) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for owner in model.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


def _moved(given: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), given)


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
