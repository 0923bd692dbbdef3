"""Export of the pruned model as one GGUF file for llama.cpp, and the check that llama.cpp runs the file."""

import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

from secateur.catalog.gguf import GgufKind, gguf_architecture, gguf_obstacle, unsupported
from secateur.catalog.sources import ModelSource
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.export.checkpoint import source_config, write_tokenizer_files
from secateur.engine.export.gguf_tokenizer import write_tokenizer
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.model.in_float32 import InFloat32
from secateur.engine.time_limit import encode
from secateur.processes import run

ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
FILE_TYPES: dict[GgufKind, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
}
LOGITS = {"F32": 1e-3, "F16": 5e-2}
"""Largest allowed difference between llama.cpp's logits and those of the model in memory, as a share of the logits'
standard deviation; the median over positions counts."""
ROUNDING = {"Q8_0": 0.05, "Q4_K_M": 0.25}
"""Largest allowed difference between a quantised tensor and the model's tensor, as a share of its norm."""
ROUTER = "ffn_gate_inp"
FAR = 8
"""Number of root mean squares of the logits' differences beyond which a single logit differs by a mistake, not by
rounding."""
PROBE, CONTINUATION = 24, 8
"""Numbers of tokens that llama.cpp reads at once, and that it then reads one by one."""
TEXTS = (
    "The river rose in March; by 1987 it hadn't fallen, they'd say, below 12.5 m.",
    "def area(r):\n    return 3.14159 * r**2  # circle\n\n\n",
    "Café, naïve, Straße; Москва, 東京.",
)
"""Texts on which tokenizers are compared. No text begins with a space, because llama.cpp puts another space before it,
as SentencePiece does, and transformers does not."""

QUANTIZE = """
import sys, llama_cpp
wide, path, file_type, threads = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(file_type), int(threads)
sys.exit(llama_cpp.llama_model_quantize(wide.encode(), path.encode(), options))
"""
TOKENIZE = """
import json, sys
from llama_cpp import Llama
path, texts = sys.argv[1:]
model = Llama(path, vocab_only=True, verbose=False)
json.dump([model.tokenize(text.encode(), add_bos=False, special=True) for text in json.loads(texts)], sys.stdout)
"""
RUN = """
import sys
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
path, probe, threads, together = sys.argv[1:]
tokens = np.load(f"{probe}.tokens.npy").tolist()
model = Llama(
    path, n_ctx=len(tokens), n_threads=int(threads), n_threads_batch=int(threads), n_gpu_layers=0,
    logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
)
model.eval(tokens[:int(together)])
for token in tokens[int(together):]:
    model.eval([token])
np.save(f"{probe}.logits.npy", model.scores[:len(tokens)])
"""


def check_ready(decoder: Decoder, source: ModelSource) -> None:
    """Check before any work that llama.cpp is installed and tokenizes text as the model's own tokenizer does.

    Raises:
        PruningError: ``gguf_unavailable`` or ``gguf_unsupported``.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise PruningError(
            ErrorCode.GGUF_UNAVAILABLE,
            "GGUF files are quantised and checked with llama.cpp, which this worker lacks: install llama-cpp-python "
            "(pip install 'secateur[gguf]'), or leave 'gguf' out of formats.",
            field="formats",
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "vocabulary.gguf")
        writer = GGUFWriter(path, "llama")
        _add_tokenizer(writer, decoder, source)
        _write(writer, list, torch.float32)
        found = json.loads(_run(TOKENIZE, str(path), json.dumps(TEXTS)))
    for text, tokens in zip(TEXTS, found, strict=True):
        if encode(decoder.tokenizer, text, add_special_tokens=False) != tokens:
            raise unsupported(f"llama.cpp makes other tokens of {text!r} than its tokenizer")


def write_gguf(decoder: Decoder, source: ModelSource, path: Path, kind: GgufKind) -> None:
    """Write the model in memory to ``path``; a quantised kind needs a temporary F16 file beside ``path``.

    Raises:
        PruningError: ``gguf_unsupported``, or ``export_invalid`` when the file that is to be quantised is wrong.
    """
    if kind in LOGITS:
        _write_wide(decoder, source, path, kind)
        return
    wide = path.with_name(f".{path.name}.wide")
    try:
        _write_wide(decoder, source, wide, "F16")
        # A mistake must be found before quantisation, whose rounding changes logits as much as a mistake does.
        check_gguf(decoder, wide, "F16")
        _run(QUANTIZE, str(wide), str(path), str(FILE_TYPES[kind].value), str(torch.get_num_threads()))
    finally:
        wide.unlink(missing_ok=True)


def check_gguf(decoder: Decoder, path: Path, kind: GgufKind) -> None:
    """Run ``path`` with llama.cpp in a new process and compare the result with the model in memory.

    llama.cpp reads random tokens at once, and then the model's own greedy continuation token by token. The logits and
    the greedy tokens must be those of the model; for a quantised file, the weights are compared instead.

    Raises:
        PruningError: ``export_invalid``; the files must not be published then.
    """
    length = min(PROBE, _context(decoder.model.config) - CONTINUATION)
    tokens = torch.randint(decoder.shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(decoder.device)
    with torch.no_grad(), InFloat32():
        for _ in range(CONTINUATION):
            logits = decoder.model(tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        expected = decoder.model(tokens, use_cache=False).logits[0].double().cpu()
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe")
        np.save(f"{probe}.tokens.npy", tokens[0].cpu().numpy())
        _run(RUN, str(path), str(probe), str(torch.get_num_threads()), str(length))
        found = torch.from_numpy(np.load(f"{probe}.logits.npy")).double()
    if not torch.isfinite(found).all():
        raise PruningError(ErrorCode.EXPORT_INVALID, "The GGUF file overflows: llama.cpp's logits are not finite.")
    if kind in ROUNDING:
        _check_weights(decoder, path, ROUNDING[kind])
        return
    compare(expected, found, length, LOGITS[kind])


def compare(expected: Tensor, found: Tensor, length: int, tolerance: float) -> None:
    """Compare the logits ``[tokens, vocabulary]`` of the model and of llama.cpp.

    Both read ``length`` tokens and then the model's greedy tokens. The greedy tokens must be equal, except where the
    model's logits of the two tokens differ by no more than :data:`FAR` root mean squares of the logits' differences at
    that position.

    Raises:
        PruningError: ``export_invalid``.
    """
    deviation = expected.std(-1)
    off = (found - expected).square().mean(-1).sqrt()
    difference = float((off / deviation).median())
    if difference > tolerance:
        raise PruningError(
            ErrorCode.EXPORT_INVALID,
            f"The GGUF file does not compute what the model does: logits differ by {difference:.1%}.",
        )
    chosen = expected.gather(-1, found.argmax(-1, keepdim=True))[:, 0]
    ahead = expected.max(-1).values - chosen
    if bool((ahead > FAR * off)[length - 1 : -1].any()):
        raise PruningError(ErrorCode.EXPORT_INVALID, "The GGUF file writes other greedy tokens than the model.")


def _check_weights(decoder: Decoder, path: Path, tolerance: float) -> None:
    reader = gguf.GGUFReader(path)
    written = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in _tensors(decoder, reader.fields["general.architecture"].contents()):
        stored = torch.tensor(gguf.quants.dequantize(written[name].data, written[name].tensor_type))
        original = tensor.float().cpu()
        difference = float((stored - original).norm() / original.norm().clamp(min=torch.finfo(torch.float32).tiny))
        if not difference <= tolerance:
            raise PruningError(
                ErrorCode.EXPORT_INVALID,
                f"The tensor {name} of the GGUF file differs from the model's by {difference:.1%}.",
            )


def _run(script: str, *arguments: str) -> str:
    """Run a script in a new process and return its standard output.

    llama.cpp may end its process when it fails, so it does not run in this process.

    Raises:
        PruningError: ``out_of_memory`` or ``export_invalid``.
    """
    command = [sys.executable, "-I", "-c", script, *arguments]
    done = run(command)
    if done.returncode == -signal.SIGKILL:
        raise PruningError(
            ErrorCode.OUT_OF_MEMORY, "llama.cpp was killed over the GGUF file, probably for want of memory."
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise PruningError(ErrorCode.EXPORT_INVALID, f"llama.cpp does not take the GGUF file: {reason}")
    return done.stdout


def _write(writer: GGUFWriter, tensors: Callable[[], Iterable[tuple[str, Tensor]]], matrices: torch.dtype) -> None:
    """Write one file from the writer's metadata and from the tensors that ``tensors()`` yields.

    ``tensors()`` is called twice and yields one tensor at a time, so only one is in memory. Matrices are stored as
    ``matrices``; routers and all other tensors are stored as float32.
    """

    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        return matrices if tensor.dim() > 1 and ROUTER not in name else torch.float32

    for name, tensor in tensors():
        stored = np.dtype(str(dtype(name, tensor)).removeprefix("torch."))
        writer.add_tensor_info(name, tensor.shape, stored, tensor.numel() * stored.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors():
            writer.write_tensor_data(tensor.to("cpu", dtype(name, tensor)).contiguous().numpy())
    finally:
        writer.close()


def _write_wide(decoder: Decoder, source: ModelSource, path: Path, kind: GgufKind) -> None:
    """Write a GGUF file of a kind that is not quantised, as :func:`write_gguf` does."""
    shape, config = decoder.shape, decoder.model.config
    uniform = len({layer.shape for layer in decoder.layers}) == 1
    if obstacle := gguf_obstacle(
        shape, config.to_dict(), kind, uniform=uniform, added_biases=_has_added_biases(decoder)
    ):
        raise obstacle
    architecture = gguf_architecture(shape.model_type, uniform)
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, decoder, uniform)
    _add_rotation(writer, config)
    if architecture.startswith("gemma"):
        _add_gemma(writer, config)
    _add_tokenizer(writer, decoder, source)
    _write(writer, lambda: _tensors(decoder, architecture), torch.float32 if kind == "F32" else torch.float16)


def _add_tokenizer(writer: GGUFWriter, decoder: Decoder, source: ModelSource) -> None:
    """Add the tokenizer's metadata; those of a vocabulary that was cut are made from the files that are published."""
    if decoder.vocabulary is None:
        write_tokenizer(writer, source, decoder.tokenizer, decoder.shape.vocab_size)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer_files(decoder, source, folder)
        (folder / "config.json").write_text(json.dumps(source_config(decoder, source)))
        cut = replace(source, path=folder, gguf_file=None)
        write_tokenizer(writer, cut, decoder.tokenizer, decoder.shape.vocab_size)


def _has_added_biases(decoder: Decoder) -> bool:
    family = decoder.shape.family
    stock = family.biased(decoder.model.config.to_dict())
    return any(layer[name].bias is not None for layer in decoder.layers for name in {*family.projections} - stock)


def _context(config: Any) -> int:
    """Return the number of positions up to which llama.cpp computes what the model computes.

    llama.cpp supports sliding windows only for Gemma; other models are limited to the size of their window.
    """
    window = getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    return positions if window is None or config.model_type.startswith("gemma") else min(positions, int(window))


def _add_sizes(writer: GGUFWriter, decoder: Decoder, uniform: bool) -> None:
    shape, config = decoder.shape, decoder.model.config
    layers = [layer.shape for layer in decoder.layers]
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(len(layers))
    for add, sizes in (
        (writer.add_feed_forward_length, [layer.channels_per_expert for layer in layers]),
        (writer.add_head_count, [layer.heads for layer in layers]),
        (writer.add_head_count_kv, [layer.kv_groups for layer in layers]),
    ):
        add(sizes[0] if uniform else sizes)
    for add_length in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add_length(layers[0].head_dim)
    if shape.family.experts:
        writer.add_expert_count(layers[0].experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(layers[0].channels_per_expert)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rotation(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])


def _add_gemma(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := config.final_logit_softcapping) is not None:
        writer.add_final_logit_softcapping(cap)


def _tensors(decoder: Decoder, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the model under llama.cpp's names and in llama.cpp's form."""
    family = decoder.shape.family
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], len(decoder.layers))
    cut = {f"{family.layers}.{index}.{name}" for index in range(len(decoder.layers)) for name in family.projections}
    for name, parameter in decoder.model.named_parameters():
        if name.rpartition(".")[0] not in cut:
            # Gemma's norms multiply by 1 + weight; llama.cpp stores the sum.
            shift = 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0
            named = names.get_name(name, (".weight", ".bias"))
            assert named is not None
            yield named, parameter.float() + shift if shift else parameter
    if architecture in ("llama", "deci") and (factors := _rope_factors(decoder)) is not None:
        yield "rope_freqs.weight", factors
    for index, layer in enumerate(decoder.layers):
        for kind in ("weight", "bias"):
            for role, tensor in _projections(layer, architecture, kind).items():
                yield f"blk.{index}.{role}.{kind}", tensor


def _projections(layer: Layer, architecture: str, kind: str) -> dict[str, Tensor]:
    """Return the weights or biases of a layer's projections under llama.cpp's names."""
    family = layer.family
    roles = dict(zip(family.attention_inputs, ("attn_q", "attn_k", "attn_v"), strict=True))
    roles |= dict(zip(family.channel_inputs, ("ffn_gate", "ffn_up"), strict=True))
    roles |= {family.attention_output: "attn_output", family.channel_output: "ffn_down"}
    found = {role: getattr(layer[name], kind) for name, role in roles.items()}
    tensors = {role: tensor for role, tensor in found.items() if tensor is not None}
    if architecture in ("llama", "deci"):
        # llama.cpp rotates neighbouring features, transformers the two halves of a head
        for role in {"attn_q", "attn_k"} & tensors.keys():
            tensors[role] = tensors[role].unflatten(0, (-1, 2, layer.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    if (mixture := layer.mixture) is not None and kind == "weight":
        for role, weight in zip(("ffn_gate", "ffn_up", "ffn_down"), mixture.stacked(), strict=True):
            del tensors[role]
            tensors[f"{role}_exps"] = weight
    if architecture == "openelm" and kind == "weight":
        tensors["attn_qkv"] = torch.cat([tensors.pop(role) for role in ("attn_q", "attn_k", "attn_v")])
    return tensors


def _rope_factors(decoder: Decoder) -> Tensor | None:
    """Return the factor by which each rotation is slowed down, ``[head_dim / 2]``, or ``None`` without scaling."""
    rope, frequencies = decoder.model.config.rope_parameters, decoder.model.base_model.rotary_emb.inv_freq.cpu()
    if rope.get("rope_type", "default") == "default":
        return None
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors: Tensor = (rope["rope_theta"] ** -exponents / frequencies.double()).float()
    return factors
