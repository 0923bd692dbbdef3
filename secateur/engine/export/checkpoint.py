"""The files of a published repository: config, modeling file, weights, tokenizer, card and manifest."""

import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from secateur.catalog.architectures import Family, LayerShape, per_layer_keys
from secateur.catalog.sources import ModelSource
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import Report
from secateur.engine.evaluation.size import weight_bytes
from secateur.engine.export.card import PICTURE, model_card
from secateur.engine.export.picture import draw_widths
from secateur.engine.export.shards import write_shards
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.per_layer import OF_LAYERS, modeling_file, own_class
from secateur.engine.model.plan import Plan
from secateur.engine.structures.experts import config_keys, units
from secateur.engine.structures.layers import written_config
from secateur.engine.structures.vocabulary import rewrite_files
from secateur.engine.structures.vocabulary.files import DESCRIPTION
from secateur.extras import missing
from secateur.files import sha256

log = logging.getLogger(__name__)

COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LICENCES = ("LICENSE*", "MODEL_LICENSE*", "NOTICE*", "USE_POLICY*")
MODELING_FILE = "modeling_pruned.py"
MANIFEST = "secateur.json"
ROOM = 64 * 2**20
"""Bytes of disk that must be free beyond the size of the weights."""
PACKAGES = ("secateur", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, which replaces ``folder`` when the context ends without an error.

    After an error, the new folder is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    staging.chmod(0o755)
    try:
        yield staging
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_room(decoder: Decoder, folder: Path, formats: Sequence[str]) -> None:
    """Check that the disk has room for the pruned model in all its formats.

    Raises:
        PruningError: ``disk_full`` (retryable).
    """
    # A GGUF file has at most float32 weights; a quantised file temporarily has a float16 file beside it.
    gguf = 4 * decoder.parameters if "gguf" in formats else 0
    need, free = weight_bytes(decoder) + gguf + ROOM, shutil.disk_usage(folder).free
    if free < need:
        raise PruningError(ErrorCode.DISK_FULL, f"The pruned model needs {need:,} bytes of disk; {free:,} are free.")


def write_model(decoder: Decoder, source: ModelSource, folder: Path, stock: bool = False) -> None:
    """Write config, weights and tokenizer into ``folder``, and the modeling file if the model needs one.

    With ``stock``, the checkpoint is one of the stock class; all layers must have the widths of the first layer.
    """
    _write_config(decoder, source, folder, stock)
    write_shards(weights(decoder), folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner can read
    _write_tokenizer(decoder, source, folder)


def fits_stock_class(decoder: Decoder) -> bool:
    """Return whether the stock class holds a model without padding, as after whole units or tokens left.

    Its layers are alike, up to the widths that the source's config gives layers without experts among mixtures.
    """
    shape = decoder.shape
    sizes = {layer.shape for layer in decoder.layers if layer.family is shape.family}
    dense = {layer.shape for layer in decoder.layers if layer.family is not shape.family}
    heads = {(layer.kv_groups, layer.heads) for layer in sizes | dense}
    return (
        len(heads) == 1
        and len(sizes) <= 1
        and dense <= {shape.dense_layer}
        and all(layer.kv_groups and layer.channels and shape.takes_heads(layer) for layer in sizes)
        and not _added_biases(decoder, decoder.model.config.to_dict())
    )


def write_manifest(decoder: Decoder, plan: Plan, folder: Path, report: Report, extra: Mapping[str, Any]) -> None:
    """Write the model card and the manifest into ``folder``; the manifest holds the plan, file hashes, and ``extra``.

    Without matplotlib, the card has no picture of the widths.
    """
    picture = "matplotlib" not in missing("eval")
    if picture:
        draw_widths(report.widths, folder / PICTURE)
    gguf_file = next((file.name for file in folder.glob("*.gguf")), None)
    own = own_class(type(decoder.model))
    card = model_card(
        report, extra, gguf_file, own.name if own else None, picture=picture, code=any(folder.glob("*.py"))
    )
    (folder / "README.md").write_text(card)
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    manifest = {**extra, "plan": plan.as_data().model_dump(mode="json"), "report": report.as_dict(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n")


def weights(decoder: Decoder) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of a model under the names that they have in its files: first those outside its layers.

    Each layer's tensors are made when they are asked for. The names are the source's: transformers 5 renames a few
    weights when it loads them, and 4 and vLLM do not.
    """
    model, path = decoder.model, decoder.shape.family.layers
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    model.set_submodule(path, nn.ModuleList())
    try:
        others = _without_ties(model.state_dict())
    finally:
        model.set_submodule(path, layers)
    yield revert_weight_conversion(model, others)
    for index, layer in enumerate(layers):
        yield revert_weight_conversion(model, _without_ties(layer.state_dict(prefix=f"{path}.{index}.")))


def _without_ties(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep only the first of tied tensors, which is the embedding.

    The base model has no head that could provide the embedding.
    """
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    return {name: state[name] for name in state if first[state[name].data_ptr()] == name}


def versions() -> dict[str, str]:
    """Return the versions of the packages on which the result depends."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _write_config(decoder: Decoder, source: ModelSource, folder: Path, stock: bool) -> None:
    shape, model = decoder.shape, decoder.model
    config = source_config(decoder, source)
    for key in ("auto_map", *OF_LAYERS):  # the source's auto_map names code that was not reviewed
        config.pop(key, None)
    _add_legacy_rope(config)
    config = written_config(config, model.config.to_dict(), shape.family)
    config.update(config_keys(max(decoder.layers, key=units)))
    config["head_dim"] = shape.stock_layer.head_dim
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    config[dtype_key] = str(model.dtype).removeprefix("torch.")
    own, classes = own_class(type(model)), _classes(decoder)
    names = {kind: stock.__name__ for kind, stock in classes.items()}
    if own is not None:
        shutil.copyfile(own, folder / own.name)
    if stock:
        layer = next((each for each in decoder.layers if each.family is shape.family), decoder.layers[0]).shape
        config.update(_config_widths(shape.family, layer), architectures=[type(model).__name__])
        if shape.hidden_size % layer.heads and shape.model_type in shape.family.twins:
            model_type, causal = shape.family.twins[shape.model_type]
            config = model.config.to_dict() | config  # keys that config.json omits have this type's defaults
            config |= {"model_type": model_type, "architectures": [causal], "sliding_window": None}
            # transformers warns of Mistral models from older versions
            config["transformers_version"] = versions()["transformers"]
        if own is not None:
            config["auto_map"] = _auto_map(own.stem, names)
    else:
        config.update(
            architectures=[f"Pruned{names['causal']}"],
            auto_map=_auto_map(Path(MODELING_FILE).stem, {kind: f"Pruned{name}" for kind, name in names.items()}),
            per_layer_config={
                str(index): _config_widths(shape.family, layer.shape) for index, layer in enumerate(decoder.layers)
            },
            allow_global_per_layer_attribute_access=True,
            added_biases=sorted(_added_biases(decoder, config)),
        )
        (folder / MODELING_FILE).write_text(
            modeling_file(shape, classes, "transformers" if own is None else f".{own.stem}")
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def source_config(decoder: Decoder, source: ModelSource) -> dict[str, Any]:
    """Return the content of the source's ``config.json``, with the decoder's own vocabulary."""
    if source.gguf_file is not None:
        return _plain_config(decoder)
    config = dict(source.config or {})
    return config if decoder.vocabulary is None else decoder.vocabulary.config(config)


def _config_widths(family: Family, layer: LayerShape) -> dict[str, int]:
    """Return a layer's widths under the config's names."""
    return {key: getattr(layer, size) for size, key in per_layer_keys(family).items()}


def _classes(decoder: Decoder) -> dict[str, type[Any]]:
    """Return the stock classes."""
    model = decoder.model
    return {"config": type(model.config), "base": type(model.base_model), "causal": type(model)}


def _auto_map(module: str, classes: dict[str, str]) -> dict[str, str]:
    kinds = {"AutoConfig": "config", "AutoModel": "base", "AutoModelForCausalLM": "causal"}
    return {auto: f"{module}.{classes[kind]}" for auto, kind in kinds.items()}


def _added_biases(decoder: Decoder, config: dict[str, Any]) -> set[str]:
    """Return the projections that have a bias now and had none in the source.

    A bias in one layer means a bias in all layers, because the modeling file makes all layers alike.
    """
    family = decoder.shape.family
    stock = family.biased(config)
    return {
        family.module(name)
        for name in family.projections
        if name not in stock
        and any(layer[name].bias is not None for layer in decoder.layers if name in layer.projections)
    }


def _plain_config(decoder: Decoder) -> dict[str, Any]:
    """Return the config of a model from a GGUF file, which has no config.json."""
    config: dict[str, Any] = decoder.model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    return config


def _add_legacy_rope(config: dict[str, Any]) -> None:
    """Add the rotary settings under the names of transformers 4.

    transformers 5 writes ``rope_parameters``, which 4 ignores; both versions read the names of 4.
    """
    by_layer_type = config.get("rope_parameters") or {}
    local, rope = by_layer_type.get("sliding_attention"), dict(by_layer_type.get("full_attention") or by_layer_type)
    neox = config["model_type"] == "gpt_neox"
    for key, legacy in (
        ("rope_theta", "rotary_emb_base" if neox else "rope_theta"),
        ("partial_rotary_factor", "rotary_pct" if neox else "partial_rotary_factor"),
    ):
        if key in rope:
            config.setdefault(legacy, rope.pop(key))
    if local and "rope_theta" in local:
        config.setdefault("rope_local_base_freq", local["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        if config["model_type"] == "phi3":  # transformers 4 accepts only these three keys
            rope = {"type": rope["rope_type"], **{key: rope[key] for key in ("short_factor", "long_factor")}}
        config.setdefault("rope_scaling", rope)


def write_tokenizer_files(decoder: Decoder, source: ModelSource, folder: Path) -> None:
    """Write the files of the decoder's tokenizer, and ``generation_config.json``, into ``folder``.

    Raises:
        PruningError: ``vocabulary_unsupported``.
    """
    assert source.path is not None
    if source.gguf_file is not None or source.chatglm:
        decoder.tokenizer.save_pretrained(folder)
        decoder.model.generation_config.save_pretrained(folder)
        return
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    if (cut := decoder.vocabulary) is not None:
        if not (folder / DESCRIPTION).is_file():
            backend: Any = cut.tokenizer
            backend.backend_tokenizer.save(str(folder / DESCRIPTION))
        for note in rewrite_files(folder, cut.vocabulary):
            log.warning(note)


def _write_tokenizer(decoder: Decoder, source: ModelSource, folder: Path) -> None:
    assert source.path is not None
    write_tokenizer_files(decoder, source, folder)
    for pattern in LICENCES:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    changed = {key: value for key, value in config.items() if key != "auto_map"}
    # transformers 4 does not know this name of transformers 5
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if changed != config:
        path.write_text(json.dumps(changed, indent=2) + "\n")
