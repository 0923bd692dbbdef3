"""The source of a model: a Hub id, ``local:NAME`` in the models folder, or a folder, with safetensors or GGUF weights.

The module reads configs and file headers but never weights, so that a request can be refused at admission.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from secateur.catalog import hub_reads
from secateur.catalog.architectures import (
    ModelShape,
    chatglm,
    check_config,
    declared_parameters,
    family_of,
    shape_from_config,
)
from secateur.catalog.gguf_header import Skipped, read_header
from secateur.catalog.names import did_you_mean
from secateur.catalog.untrusted import check_values, read_json
from secateur.contract.errors import ErrorCode, PruningError
from secateur.extras import require

LOCAL_PREFIX = "local:"
UPLOAD_PREFIX = "upload:"
LOCAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
LARGEST_HEADER = 32 * 2**20
"""Largest header of a safetensors file in bytes; a tensor takes about 150."""
MOST_SHARDS, MOST_TENSORS = 4096, 2**18
"""Largest numbers of safetensors files and of tensors of a model."""
LARGEST_TOKENIZER = 128 * 2**20
"""Largest file of a tokenizer in bytes; the largest published ones have about 40 MB."""
FEWEST = 0.5
"""Share of the parameters that a config declares that must be in the weight files, before the files are compared tensor
by tensor."""
LARGEST_CONFIG = 4 * 2**20
"""Largest number of bytes of a ``config.json`` on the Hub; known ones have far less than a million."""
HALF_DTYPES = ("bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "ice_text.model")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BESIDE_TOKENIZER = (*TOKENIZER_CONFIGS, "merges.txt", "vocab.txt")

# GGUF metadata keys ("{architecture}.…") by config.json's names (GGUF specification, "Standardized key-value pairs").
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    ``path`` is the model's folder if the model is on this machine; ``revision`` is the model's commit on the Hub.
    """

    model_id: str
    path: Path | None
    revision: str | None
    gguf_file: str | None
    config: dict[str, Any] | None
    """The content of ``config.json``, or the same fields from GGUF metadata or from ChatGLM's config.

    ``None`` for a GGUF file that is still on the Hub.
    """
    weights_digest: str | None = None
    """A hash of the weights of a model that was passed in memory, whose folder holds only config and tokenizer."""
    chatglm: bool = False
    """Whether the files have the form that ChatGLM's own code reads.

    transformers' ``glm`` and Secateur's ``chatglm6b`` read other names.
    """

    @property
    def name(self) -> str:
        """The model's name in reports and model cards; for a path, only the last part of the path."""
        known = self.revision is not None or self.model_id.startswith(LOCAL_PREFIX)
        return self.model_id if known else Path(self.model_id).name

    @property
    def dtype(self) -> str:
        """The dtype that ``auto`` stands for: bfloat16 or float16 if the config names it, else float32.

        GGUF files are dequantised to float32.
        """
        config = self.config or {}
        name = config.get("dtype") or config.get("torch_dtype")
        return str(name) if name in HALF_DTYPES else "float32"

    @property
    def sizes_known(self) -> bool:
        """Whether :func:`read_shape` can return the sizes: there is a config, and its family has an adapter."""
        return self.config is not None and family_of(self.config) is not None

    def fingerprint(self) -> str:
        """Return a value that changes when the weights may have changed.

        The value is the hash of weights that were passed in memory, or the commit, or a hash over the names, sizes and
        times of the files.
        """
        if self.weights_digest is not None:
            return f"weights:{self.weights_digest}"
        if self.path is None or self.revision is not None:
            return f"commit:{self.revision}"
        lines = [
            f"{file.name} {stat.st_size} {stat.st_mtime_ns}"
            for file in sorted(self.path.iterdir())
            if file.is_file() and (stat := file.stat())
        ]
        return "files:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_shape(source: ModelSource) -> ModelShape:
    """Return the sizes of a located model.

    Raises:
        PruningError: ``unsupported_architecture``, ``weights_quantized``, ``config_invalid``, or ``config_unknown`` for a
            GGUF file on the Hub.
    """
    if source.config is None:
        raise PruningError(
            ErrorCode.CONFIG_UNKNOWN, "The sizes of a GGUF file are known once it is downloaded.", field="gguf_file"
        )
    return shape_from_config(source.config)


def check_size(shape: ModelShape | None, most: int | None) -> None:
    """Check that a model of sizes ``shape`` has at most ``most`` parameters; sizes that are not known pass.

    Raises:
        PruningError: ``model_too_large``.
    """
    if shape is not None and most is not None and shape.parameters > most:
        raise PruningError(
            ErrorCode.MODEL_TOO_LARGE,
            f"The model has {shape.parameters:,} parameters; this service takes {most:,} at most.",
            field="model_id",
        )


def locate(
    model_id: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    models_dir: Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    allow_paths: bool = False,
) -> ModelSource:
    """Find a model and read its config; for a local model, also check the headers of its weight files.

    ``token`` is the Hub token; ``None`` sends the token that is stored on this machine, if there is one, and ``False``
    sends none. ``allow_paths`` also allows folders and GGUF files by path. The library and the command line set it, and the API
    never does.

    Raises:
        PruningError: ``model_not_found``, ``model_id_invalid``, ``revision_not_found``, ``model_gated``,
            ``hub_unavailable`` (retryable), ``config_invalid``, ``weights_missing``, ``weights_corrupt``,
            ``weights_quantized``, ``tokenizer_missing``, ``tokenizer_unusable``, ``unsupported_architecture``.
    """
    if model_id.startswith(LOCAL_PREFIX):
        name = model_id.removeprefix(LOCAL_PREFIX)
        if not LOCAL_NAME.fullmatch(name):
            raise PruningError(
                ErrorCode.MODEL_ID_INVALID,
                f"'{name}' is no name of a local model: letters, digits, '.', '_' and '-' only.",
                field="model_id",
            )
        folder = models_dir / name if models_dir else None
        if folder is None or not folder.is_dir():
            known = (
                sorted(entry.name for entry in models_dir.iterdir() if entry.is_dir())
                if models_dir and models_dir.is_dir()
                else []
            )
            raise PruningError(
                ErrorCode.MODEL_NOT_FOUND,
                f"There is no local model '{name}'{did_you_mean(name, known)}",
                field="model_id",
            )
        return _local(model_id, folder, revision, gguf_file)
    if allow_paths and Path(model_id).is_file() and model_id.endswith(".gguf"):
        return _local(model_id, Path(model_id).parent, revision, Path(model_id).name)
    if allow_paths and Path(model_id).is_dir():
        return _local(model_id, Path(model_id), revision, gguf_file)
    try:
        validate_repo_id(model_id)
    except errors.HFValidationError as error:
        no_folder = "there is no folder of that name, and " if allow_paths else ""
        raise PruningError(
            ErrorCode.MODEL_ID_INVALID, f"'{model_id}': {no_folder}it is no Hub id: {error}", field="model_id"
        ) from None
    return _on_hub(model_id, revision, gguf_file, token, endpoint)


def _local(model_id: str, folder: Path, revision: str | None, gguf_file: str | None) -> ModelSource:
    if revision is not None:
        raise PruningError(
            ErrorCode.REVISION_NOT_FOUND,
            f"{model_id} is on this machine, where models have no revisions.",
            field="revision",
        )
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is None and not (folder / "config.json").exists() and len(found) == 1:
        gguf_file = found[0]
    if gguf_file is not None:
        if gguf_file not in found and not (folder / gguf_file).is_file():
            raise PruningError(
                ErrorCode.MODEL_NOT_FOUND,
                f"There is no '{gguf_file}' in {model_id}; there are: {', '.join(found) or 'no GGUF files'}.",
                field="gguf_file",
            )
        return ModelSource(model_id, folder, None, gguf_file, _gguf_config(folder / gguf_file))
    source = _described(ModelSource(model_id, folder, None, None, _read_config(model_id, folder / "config.json")))
    check_files(source)
    return source


def check_files(source: ModelSource) -> None:
    """Check the files of a safetensors model on this machine.

    Raises:
        PruningError: ``weights_missing``, ``weights_corrupt``, ``config_invalid``, ``tokenizer_missing`` or
            ``tokenizer_unusable``.
    """
    assert source.path is not None
    check_weight_files(source.model_id, source.path)
    _check_generation_config(source.model_id, source.path / "generation_config.json")
    _check_tokenizer_files(source.model_id, source.path)


def check_declared(source: ModelSource) -> None:
    """Check that the weight files hold about as much as the config declares, before anything is built from the config.

    Raises:
        PruningError: ``config_invalid``.
    """
    assert source.path is not None and source.config is not None
    tensors = elements = 0
    for file in sorted(set(check_weight_files(source.model_id, source.path).values())):
        with safe_open(file, framework="numpy") as shard:
            sizes = [math.prod(shard.get_slice(name).get_shape()) for name in shard.keys()]  # noqa: SIM118
        tensors, elements = tensors + len(sizes), elements + sum(sizes)
    _compare(source.model_id, source.config, tensors, elements)


def _check_generation_config(model_id: str, path: Path) -> None:
    if not path.exists():
        return
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise PruningError(
            ErrorCode.CONFIG_INVALID, f"{path.name} of {model_id} cannot be read: {error}", field="model_id"
        ) from None
    check_values(found, path.name)


def _check_tokenizer_files(model_id: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise PruningError(
            ErrorCode.TOKENIZER_MISSING,
            f"{model_id} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            field="model_id",
        )
    for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER):
        path = folder / name
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            if path.exists() and path.stat().st_size > LARGEST_TOKENIZER:
                raise ValueError(f"it has {path.stat().st_size:,} bytes; allowed: {LARGEST_TOKENIZER:,}")
            if path.exists() and name in TOKENIZER_CONFIGS:
                read_json(path)
        except (OSError, ValueError) as error:
            raise PruningError(
                ErrorCode.TOKENIZER_UNUSABLE, f"{name} of {model_id} cannot be read: {error}", field="model_id"
            ) from None


def _compare(model_id: str, config: Mapping[str, Any], tensors: int, elements: int) -> None:
    layers, parameters = declared_parameters(config)
    if layers > tensors or elements < FEWEST * parameters:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"The config of {model_id} declares {layers:,} layers and {parameters:,} parameters or more, and its weight "
            f"files hold {tensors:,} tensors with {elements:,} parameters.",
            field="model_id",
        )


def _described(source: ModelSource) -> ModelSource:
    """Return the source with its config in the form of transformers, after a check that the model can be pruned."""
    assert source.config is not None
    if source.config.get("model_type") == chatglm.MODEL_TYPE:
        check_values(source.config)
        source = replace(source, config=chatglm.translate(source.config), chatglm=True)
    check_config(source.config or {})
    return source


def _read_config(model_id: str, path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise PruningError(ErrorCode.MODEL_NOT_FOUND, f"{model_id} has no config.json.", field="model_id") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PruningError(
            ErrorCode.CONFIG_INVALID, f"config.json of {model_id} cannot be read: {reason}", field="model_id"
        ) from None
    if not isinstance(config, dict):
        raise PruningError(ErrorCode.CONFIG_INVALID, f"config.json of {model_id} is not an object.", field="model_id")
    return config


def check_weight_files(model_id: str, folder: Path) -> dict[str, Path]:
    """Read the headers of a folder's safetensors files, to find truncated and corrupt files without reading weights.

    Return the file that holds each tensor.

    Raises:
        PruningError: ``weights_missing`` or ``weights_corrupt``.
    """
    index = folder / "model.safetensors.index.json"
    try:
        wanted = _weight_map(index) if index.exists() else {}
        files = sorted(set(wanted.values())) or sorted(file.name for file in folder.glob("*.safetensors"))
        if len(files) > MOST_SHARDS:
            raise ValueError(f"it names {len(files):,} files; allowed: {MOST_SHARDS:,}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PruningError(
            ErrorCode.WEIGHTS_CORRUPT, f"{index.name} of {model_id} cannot be read: {reason}", field="model_id"
        ) from None
    if not files:
        raise PruningError(
            ErrorCode.WEIGHTS_MISSING,
            f"{model_id} has no safetensors weights (pickled weights are never loaded).",
            field="model_id",
        )
    present: dict[str, Path] = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise PruningError(ErrorCode.WEIGHTS_MISSING, f"{model_id} lacks the shard {name}.", field="model_id")
        try:
            _check_header_size(folder / name)
            with safe_open(folder / name, framework="numpy") as shard:
                present |= dict.fromkeys(shard.keys(), folder / name)
            if len(present) > MOST_TENSORS:
                raise ValueError(f"the model has more than {MOST_TENSORS:,} tensors")
        except (SafetensorError, OSError, ValueError) as error:
            raise PruningError(
                ErrorCode.WEIGHTS_CORRUPT, f"{name} of {model_id} is corrupt or truncated: {error}", field="model_id"
            ) from None
    if missing := sorted(set(wanted) - present.keys()):
        raise PruningError(ErrorCode.WEIGHTS_MISSING, f"{model_id} lacks the tensor {missing[0]}.", field="model_id")
    return present


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index of shards names them.

    Raises:
        OSError: The index cannot be read.
        ValueError: The index is not as it should be.
    """
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict):
        raise ValueError("it is no object with an object 'weight_map'")
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError("a shard's name is no text")
    return names


def _check_header_size(path: Path) -> None:
    """Check the size that a safetensors file gives for its header (safetensors format: 8 bytes, little-endian).

    Raises:
        ValueError: The header is too large.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if LARGEST_HEADER < size < path.stat().st_size:  # safetensors itself reports a header that ends behind the file
        raise ValueError(f"its header has {size:,} bytes; allowed: {LARGEST_HEADER:,}")


def _gguf_config(path: Path) -> dict[str, Any]:
    """Return the sizes in a GGUF file's metadata, under the names of config.json."""
    require("engine", "Reading a GGUF file", "gguf", field="gguf_file")
    from gguf.constants import GGML_QUANT_SIZES

    try:
        header = read_header(path, {int(kind): block for kind, block in GGML_QUANT_SIZES.items()})
        architecture = header.values["general.architecture"]
        if not isinstance(architecture, str):
            raise ValueError("its 'general.architecture' is no text")
        config: dict[str, Any] = {"model_type": architecture}
        for name, key in GGUF_KEYS.items():
            value = header.values.get(f"{architecture}.{key}")
            if value is not None:
                config[name] = value
        tokens = header.values.get("tokenizer.ggml.tokens")
        config.setdefault("vocab_size", tokens.length if isinstance(tokens, Skipped) else None)
    except KeyError as error:
        raise _unreadable(path, f"it has no {error}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if f"{architecture}.expert_count" in header.values:
        raise PruningError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"{path.name} holds a mixture of experts, which is read from safetensors alone.",
            field="gguf_file",
        )
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    check_values(config)
    shape_from_config(config)
    _compare(path.name, config, len(header.tensors), sum(header.tensors.values()))
    return config


def _unreadable(path: Path, reason: str) -> PruningError:
    return PruningError(
        ErrorCode.WEIGHTS_CORRUPT, f"{path.name} is no readable GGUF file: {reason}.", field="gguf_file"
    )


def _on_hub(
    model_id: str, revision: str | None, gguf_file: str | None, token: str | bool | None, endpoint: str | None
) -> ModelSource:
    try:
        commit, files = hub_reads.model_info(model_id, revision, endpoint, token)
        if gguf_file is not None:
            if gguf_file not in files:
                raise PruningError(
                    ErrorCode.MODEL_NOT_FOUND, f"There is no file '{gguf_file}' in {model_id}.", field="gguf_file"
                )
            return ModelSource(model_id, None, commit, gguf_file, None)
        if not any(name.endswith(".safetensors") for name in files):
            raise PruningError(
                ErrorCode.WEIGHTS_MISSING,
                f"{model_id} has no safetensors weights (pickled weights are never loaded).",
                field="model_id",
            )
        if not any(name in files for name in TOKENIZER_FILES):
            raise PruningError(ErrorCode.TOKENIZER_MISSING, f"{model_id} has no tokenizer.", field="model_id")
        content = hub_reads.read(f"/{model_id}/resolve/{commit}/config.json", endpoint, token, LARGEST_CONFIG)
    except PruningError:
        raise
    except hub_reads.TooLarge as error:
        raise PruningError(
            ErrorCode.CONFIG_INVALID, f"config.json of {model_id} cannot be read: {error}", field="model_id"
        ) from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise hub_error(error, model_id) from None
    try:
        config = json.loads(content)
    except RecursionError:
        config = None
    except ValueError as error:
        raise PruningError(
            ErrorCode.CONFIG_INVALID, f"config.json of {model_id} cannot be read: {error}", field="model_id"
        ) from None
    if not isinstance(config, dict):
        raise PruningError(ErrorCode.CONFIG_INVALID, f"config.json of {model_id} is not an object.", field="model_id")
    return _described(ModelSource(model_id, None, commit, None, config))


def hub_error(error: Exception, model_id: str) -> PruningError:
    """Return the error that explains a failed call to the Hub to a user."""
    if isinstance(error, errors.GatedRepoError):
        return PruningError(
            ErrorCode.MODEL_GATED, f"{model_id} is gated: accept its terms with the token's account.", field="model_id"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PruningError(ErrorCode.REVISION_NOT_FOUND, f"{model_id} has no such revision.", field="revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return PruningError(
            ErrorCode.MODEL_NOT_FOUND,
            f"There is no model '{model_id}' on the Hub, or the token may not read it.",
            field="model_id",
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return PruningError(ErrorCode.CONFIG_INVALID, f"{model_id} has no config.json.", field="model_id")
    return PruningError(
        ErrorCode.HUB_UNAVAILABLE, f"The Hub could not be reached for {model_id}: {type(error).__name__}."
    )
