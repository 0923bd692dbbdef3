"""Downloading, loading and checking of models: from a located source to a sound model in memory."""

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from secateur.catalog.architectures import ModelShape, check_config
from secateur.catalog.sources import (
    ModelSource,
    check_declared,
    check_files,
    check_size,
    check_weight_files,
    hub_error,
    locate,
)
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model import chatglm
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.generic import sizes_of, verify
from secateur.engine.model.modeling_chatglm6b import ChatGLM6BConfig, ChatGLM6BForCausalLM
from secateur.engine.model.per_layer import as_stock, pruned_class
from secateur.engine.model.placement import Placement
from secateur.engine.time_limit import with_tokenizer

# The pattern is not *.safetensors, because some repositories hold a second copy of the model under other names.
HUB_FILES = [
    "model*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "MODEL_LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]


def download(
    source: ModelSource, token: str | None, endpoint: str | None, told: Callable[[int, int], None]
) -> ModelSource:
    """Download the files of a source, check them against its config, and return the source with its local path.

    The Hub cache keeps files that were downloaded before. ``told`` is called with the number of bytes that are on this
    machine, and with the number of bytes of all files that are known so far.

    Raises:
        PruningError: ``hub_unavailable`` (retryable), ``weights_missing``, ``weights_corrupt``, ``config_invalid``.
    """
    if source.path is not None:
        if source.gguf_file is None:
            check_declared(source)
        return source
    patterns = HUB_FILES if source.gguf_file is None else [source.gguf_file, *HUB_FILES[-4:]]
    try:
        folder = snapshot_download(
            source.model_id,
            revision=source.revision,
            allow_patterns=patterns,
            token=token,
            endpoint=endpoint,
            tqdm_class=_bar(told),
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise hub_error(error, source.model_id) from None
    if source.gguf_file is None:
        source = replace(source, path=Path(folder))
        check_files(source)
        check_declared(source)
        return source
    local = locate(folder, gguf_file=source.gguf_file, allow_paths=True)
    return replace(source, path=Path(folder), config=local.config)


def _bar(told: Callable[[int, int], None]) -> type[tqdm]:
    """Return a progress bar class for ``snapshot_download`` that shows nothing and reports bytes to ``told``."""

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._bytes = options.get("name") == "huggingface_hub.snapshot_download"
            self._here = 0
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._here += int(n or 0)
            if self._bytes:
                told(self._here, int(self.total or 0))
            return None

    return Bar


def load(
    source: ModelSource,
    dtype: str,
    placement: Placement | None = None,
    max_parameters: int | None = None,
) -> Decoder:
    """Load a downloaded model, frozen and in evaluation mode.

    With ``dtype`` ``auto``, the model has the dtype :attr:`ModelSource.dtype`. ``placement`` moves the model to its devices;
    without a placement, the model is on the CPU.

    Raises:
        PruningError: ``model_too_large``, ``unsupported_architecture``, ``config_invalid``, ``weights_missing``,
            ``weights_corrupt``, ``weights_not_finite``, ``tokenizer_missing``, ``tokenizer_unusable``.
    """
    assert source.path is not None
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
    shape = sizes_of(source)
    check_size(shape, max_parameters)
    tokenizer = _load_tokenizer(source)
    if shape.family.experts:
        _check_experts(source, shape.stock_layer.experts)
    return adopt(_load_model(source, dtype, shape), tokenizer, source, placement)


def describe_loaded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, with_weights: bool
) -> ModelSource:
    """Write the files of a loaded model into ``folder`` and return them as a source.

    The files are the config and the tokenizer and, ``with_weights``, the weights, which are needed to load the model
    again.

    Raises:
        PruningError: ``unsupported_architecture``, ``weights_quantized``, ``config_invalid``; ``weights_missing`` when
            weights are not in memory.
    """
    name = str(model.config.name_or_path or type(model).__name__)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PruningError(
            ErrorCode.WEIGHTS_MISSING,
            "The model has weights that are not in memory (on the device 'meta').",
            field="model",
        )
    check_config(model.config.to_dict())
    if with_weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return ModelSource(name, folder, None, None, config, weights_digest=digest.hexdigest())


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    placement: Placement | None = None,
) -> Decoder:
    """Return a decoder over a loaded model, which is frozen, set to evaluation mode and pruned in place.

    Raises:
        PruningError: ``unsupported_architecture``, ``config_invalid``, ``weights_not_finite``.
    """
    decoder = Decoder(model.eval().requires_grad_(False), tokenizer, sizes_of(source), placement)
    _check(decoder, source)
    if not source.sizes_known:
        verify(decoder)
    return decoder


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    assert source.path is not None
    path, gguf_file = source.path, source.gguf_file

    def read() -> PreTrainedTokenizerBase:
        if source.chatglm:
            return chatglm.load_tokenizer(source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, gguf_file=gguf_file, trust_remote_code=False
        )
        return tokenizer

    try:
        return with_tokenizer(0, read)
    except PruningError:
        raise
    except Exception as error:  # the loaders pass on any exception of their parsers
        raise PruningError(
            ErrorCode.TOKENIZER_MISSING,
            f"The tokenizer of {source.model_id} cannot be loaded: {error}",
            field="model_id",
        ) from error


def _load_model(source: ModelSource, dtype: str, shape: ModelShape) -> PreTrainedModel:
    torch_dtype: torch.dtype = getattr(torch, source.dtype if dtype == "auto" else dtype)
    try:
        if source.chatglm:
            return chatglm.load_model(source, torch_dtype)
        assert source.config is not None
        # Our class is not registered with AutoModel, which would then also load pruned models with it.
        own = source.config["model_type"] == ChatGLM6BConfig.model_type
        kind = ChatGLM6BForCausalLM if own else AutoModelForCausalLM
        per_layer = bool(source.config.get("per_layer_config"))
        model, info = (pruned_class(shape) if per_layer else kind).from_pretrained(
            source.path,
            gguf_file=source.gguf_file,
            # Without dequantize, transformers may keep weights packed, which can be neither scored nor cut.
            quantization_config=GgufConfig(dequantize=True) if source.gguf_file else None,
            dtype=torch_dtype,
            use_safetensors=None if source.gguf_file else True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below by name; transformers would only print a table
            output_loading_info=True,
        )
    except (MemoryError, PruningError):
        raise
    except Exception as error:  # the loaders pass on any exception of their parsers
        if isinstance(error, torch.OutOfMemoryError):
            raise
        corrupt = isinstance(error, SafetensorError | OSError)
        code = ErrorCode.WEIGHTS_CORRUPT if corrupt else ErrorCode.CONFIG_INVALID
        raise PruningError(
            code, f"{source.model_id} cannot be loaded: {_first_line(error)}", field="model_id"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise PruningError(
            ErrorCode.WEIGHTS_MISSING, f"{source.model_id} lacks the tensor {missing[0]}.", field="model_id"
        )
    beyond = sorted(name for name in info["unexpected_keys"] if name.startswith(f"{shape.family.layers}."))
    if beyond:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"The config of {source.model_id} has no place for its tensor {beyond[0]}.",
            field="model_id",
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            "The tensor {} of {} is {}, and its config makes it {}.".format(
                mismatched[0][0], source.model_id, *map(list, mismatched[0][1:])
            ),
            field="model_id",
        )
    loaded: PreTrainedModel = as_stock(model) if per_layer else model
    return loaded


def _check_experts(source: ModelSource, count: int) -> None:
    """Check the stored tensors of all experts, so that an error names the tensor in the file.

    Loading would name only the tensors into which the experts' tensors are joined.

    Raises:
        PruningError: ``weights_missing`` or ``config_invalid``.
    """
    assert source.path is not None
    stored: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(dict)
    for file in sorted(set(check_weight_files(source.model_id, source.path).values())):
        with safe_open(file, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118
                if match := re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", name):
                    stored[match[1], match[3]][int(match[2])] = shard.get_slice(name).get_shape()
    for (before, after), shapes in stored.items():
        if missing := sorted(set(range(count)) - shapes.keys()):
            raise PruningError(
                ErrorCode.WEIGHTS_MISSING,
                f"{source.model_id} lacks the tensor {before}{missing[0]}{after}; its config has {count} experts.",
                field="model_id",
            )
        if odd := [expert for expert, shape in sorted(shapes.items()) if expert >= count or shape != shapes[0]]:
            raise PruningError(
                ErrorCode.CONFIG_INVALID,
                f"The tensor {before}{odd[0]}{after} of {source.model_id} is not like the first of {count} experts'.",
                field="model_id",
            )


def _check(decoder: Decoder, source: ModelSource) -> None:
    for name, parameter in decoder.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise PruningError(
                ErrorCode.WEIGHTS_NOT_FINITE,
                f"The tensor {name} of {source.model_id} holds NaN or infinity.",
                field="model_id",
            )
    if decoder.projection_parameters != decoder.shape.prunable_parameters:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"The config of {source.model_id} makes {decoder.shape.prunable_parameters} prunable parameters, "
            f"its weights have {decoder.projection_parameters}.",
            field="model_id",
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
