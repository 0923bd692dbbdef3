"""Computation in float32 with a model of any dtype, one weight at a time."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

HALVES = (torch.bfloat16, torch.float16)


class InFloat32(TorchFunctionMode):
    """While this context lasts, every torch function gets float32 copies of the bfloat16 and float16 tensors it is given.

    A model computes as if its weights had been converted, but the memory holds the copy of one weight at a time. Two
    implementations of the same model then differ by roundings of float32, whatever dtype the weights have. Functions
    that change a tensor in place change the copy, so no weights may be changed in this context. Products are not
    computed in TF32, whatever the program has set.
    """

    def __enter__(self) -> Self:
        self._precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.set_float32_matmul_precision(self._precision)

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widened(tensor: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return tensor.float() if tensor.dtype in HALVES else tensor

        args, kwargs = tree_map_only(Tensor, widened, (args, kwargs or {}))
        return function(*args, **kwargs)
