"""ChatGLM2, ChatGLM3 and GLM-4 from the files of their own repositories, with none of their code."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmConfig, PreTrainedTokenizerFast

from secateur.catalog.sources import locate, read_shape
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.model.loading import load
from tests import hub as fake_hub
from tests.engine.models import english, make_tokenizer
from tests.engine.running import prune

CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 160,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 48,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 512,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    "chat_template": "[gMASK]sop{% for message in messages %}<|{{ message.role }}|>\n {{ message.content }}{% endfor %}",
}
ROTARY = "transformer.rotary_pos_emb.inv_freq"
LAYER = "transformer.encoder.layers.1"
TOKENS = torch.randint(440, (2, 40), generator=torch.Generator().manual_seed(0))
ASKED = PruningSpec(
    target_ratio=0.3,
    method="secateur",
    calibration=Calibration(texts=english("calibration"), samples=8, sequence_length=32),
    evaluation=Evaluation(texts=english("evaluation"), sequence_length=32, samples=4, latency=False, prompts=[]),
)


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Under the published names, large enough that every unit matters."""
    generator = torch.Generator().manual_seed(seed)
    hidden, channels, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    attention = config["num_attention_heads"] * config["kv_channels"]
    rows = attention + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
    }
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attention.query_key_value.weight": (rows, hidden),
            f"{layer}.self_attention.dense.weight": (hidden, attention),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * channels, hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": (hidden, channels),
        }
        if config["add_qkv_bias"]:
            shapes[f"{layer}.self_attention.query_key_value.bias"] = (rows,)
    weights = {name: torch.randn(shape, generator=generator) * 0.12 for name, shape in shapes.items()}
    weights |= {name: weight + 1 for name, weight in weights.items() if "layernorm" in name}
    size = config["kv_channels"] // 2
    return {**weights, ROTARY: 1 / 10000 ** (torch.arange(0, size, 2) / size)}


def chatglm(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits, written from the published architecture; with complex numbers for the rotation."""
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    length, rotated = tokens.shape[1], size // 2

    def norm(hidden: Tensor, name: str) -> Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt()
        return weights[f"{name}.weight"] * hidden * scale

    base = 10000 * config.get("rope_ratio", 1)
    frequencies = torch.tensor([base ** (-2 * pair / rotated) for pair in range(rotated // 2)])
    angles = torch.arange(length)[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotate(states: Tensor) -> Tensor:
        """The first half of each head's features, in pairs of neighbours."""
        pairs = torch.view_as_complex(states[..., :rotated].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), states[..., rotated:]], -1)

    hidden = weights["transformer.embedding.word_embeddings.weight"][tokens]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}"
        qkv, attended = f"{layer}.self_attention.query_key_value", norm(hidden, f"{layer}.input_layernorm")
        mixed = linear(attended, weights[f"{qkv}.weight"], weights.get(f"{qkv}.bias"))
        query, key, value = (
            part.unflatten(-1, (-1, size)) for part in mixed.split([heads * size, groups * size, groups * size], -1)
        )
        query, key = rotate(query), rotate(key)
        key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(size)
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        context = torch.einsum("bhqk,bkhd->bqhd", shares, value).flatten(-2)
        hidden = hidden + linear(context, weights[f"{layer}.self_attention.dense.weight"])
        entering = norm(hidden, f"{layer}.post_attention_layernorm")
        gate, up = linear(entering, weights[f"{layer}.mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        hidden = hidden + linear(silu(gate) * up, weights[f"{layer}.mlp.dense_4h_to_h.weight"])
    return linear(norm(hidden, "transformer.encoder.final_layernorm"), weights["transformer.output_layer.weight"])


def sentencepiece(**options: Any) -> bytes:
    lines = [line for text in english("calibration") for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=440,
        minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )
    return model.getvalue()


def write(folder: Path, model: bytes, **changes: Any) -> dict[str, Tensor]:
    """A repository as published, in two shards; its weights."""
    config = {**CONFIG, **changes}
    weights = random_weights(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "MODEL_LICENSE").write_text("The ChatGLM licence")
    names = sorted(weights)
    shards = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, own in shards.items():
        save_file({name: weights[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


@pytest.fixture(scope="module")
def model_file() -> bytes:
    return sentencepiece(normalization_rule_name="identity")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multi_query_group_num": 1},
        {"multi_query_group_num": 4, "add_qkv_bias": False},
        {"rope_ratio": 50, "layernorm_epsilon": 1.5625e-7, "kv_channels": 8},
    ],
)
def test_it_computes_what_chatglm_does(changes: dict[str, Any], model_file: bytes, tmp_path: Path) -> None:
    weights = write(tmp_path / "model", model_file, **changes)
    source = locate(str(tmp_path / "model"), allow_paths=True)
    decoder = load(source, "auto")
    expected = chatglm({**CONFIG, **changes}, weights, TOKENS)
    assert expected.std() > 0.5
    assert torch.allclose(decoder.model(TOKENS).logits, expected, rtol=0, atol=1e-5)
    numbers = sum(weight.numel() for name, weight in weights.items() if name != ROTARY)
    assert read_shape(source).parameters == decoder.parameters == numbers
    assert isinstance(decoder.model.config, GlmConfig) and decoder.model.generation_config.eos_token_id == 2


def test_a_pruned_one_is_an_ordinary_glm(model_file: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model", model_file, torch_dtype="bfloat16")
    report = prune(str(tmp_path / "model"), ASKED, tmp_path / "out").report
    assert report["source"]["family"] == "glm" and report["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "glm" and config["architectures"] == ["PrunedGlmForCausalLM"]
    assert config["rope_theta"] == 10000 and config["partial_rotary_factor"] == 0.5
    assert not config.keys() & {"num_layers", "padded_vocab_size", "kv_channels"}
    assert "chatglm" not in (tmp_path / "out" / "tokenizer_config.json").read_text().lower()
    assert (tmp_path / "out" / "MODEL_LICENSE").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto").eval()
    assert model.generate(TOKENS, max_new_tokens=4, eos_token_id=None, do_sample=False).shape == (2, 44)
    tokenizer, source = AutoTokenizer.from_pretrained(tmp_path / "out"), SentencePieceProcessor(model_proto=model_file)
    text = "The river rose.\nA philosopher, a sop: 清华"
    assert tokenizer(text).input_ids == [441, 443, *source.encode(text)]
    assert tokenizer.decode(source.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 0, "left")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello there"}], tokenize=False)
    assert tokenizer(chat, add_special_tokens=False).input_ids == [
        *(441, 443, 446),
        *source.encode("\n"),
        *source.encode("Hello there"),
    ]


def test_from_the_hub(model_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "model", model_file)
    with fake_hub.running() as hub:
        hub.create("org/model", files={file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})
        asked = ASKED.model_copy(update={"method": "magnitude"})
        result = prune("org/model", asked, tmp_path / "out", token=fake_hub.TOKEN, endpoint=hub.url)
    assert result.report["source"]["model_type"] == "glm" and (tmp_path / "out" / "MODEL_LICENSE").is_file()


def test_a_tokenizer_that_was_made_before(model_file: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model", b"no SentencePiece model")
    own = make_tokenizer()
    own.backend_tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({**TOKENIZER_CONFIG, "eos_token": "<|end|>", "pad_token": "<|end|>"})
    )
    prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.eos_token == "<|end|>"
    assert tokenizer("The river").input_ids == own("The river").input_ids


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": False},
    ],
)
def test_every_kind_of_sentencepiece_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece(**options)
    write(tmp_path / "model", model)
    tokenizer = load(locate(str(tmp_path / "model"), allow_paths=True), "auto").tokenizer
    text = "\n\n".join(english("evaluation"))
    assert tokenizer(text, add_special_tokens=False).input_ids == SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: b"IQ== 0\nIg== 1\n", "no SentencePiece model"),
        (lambda: sentencepiece(user_defined_symbols=["<sop>"]), "control token"),
        (lambda: sentencepiece(user_defined_symbols=["er"]), "does not make of it"),
    ],
)
def test_a_tokenizer_that_cannot_be_had(model: Callable[[], bytes], says: str, tmp_path: Path) -> None:
    write(tmp_path / "model", model())
    with pytest.raises(PruningError) as caught:
        prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    assert caught.value.code == "tokenizer_missing" and says in caught.value.message
    assert "tokenizer.json" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "unsupported_architecture", "_post_layernorm' is True"),
        ({"rmsnorm": False}, "unsupported_architecture", "'rmsnorm' is False"),
        ({"post_layer_norm": False}, "unsupported_architecture", "'post_layer_norm'"),
        ({"add_bias_linear": True}, "unsupported_architecture", "'add_bias_linear'"),
        ({"multi_query_attention": False}, "unsupported_architecture", "'multi_query_attention'"),
        ({"original_rope": False}, "unsupported_architecture", "'original_rope'"),
        ({"pre_seq_len": 128}, "unsupported_architecture", "'pre_seq_len' is 128"),
        ({"rope_ratio": 16}, "unsupported_architecture", "'rope_ratio' is 16"),
        ({"rope_ratio": "50"}, "config_invalid", "'rope_ratio'"),
        ({"layernorm_epsilon": 0}, "config_invalid", "'layernorm_epsilon'"),
        ({"kv_channels": 10}, "config_invalid", "'kv_channels' is 10"),
        ({"kv_channels": None}, "config_invalid", "'kv_channels'"),
        ({"num_layers": "3"}, "config_invalid", "'num_layers'"),
        ({"multi_query_group_num": 3}, "config_invalid", "no multiple of 3"),
        ({"quantization_bit": 4}, "weights_quantized", "quantised"),
        ({"vision_config": {"hidden_size": 8}}, "unsupported_architecture", "'vision_config'"),
        ({"num_layers": 2}, "config_invalid", "transformer.encoder.layers.2."),
        ({"num_layers": 4}, "weights_missing", "transformer.encoder.layers.3."),
        ({"add_qkv_bias": False}, "config_invalid", "query_key_value.bias"),
        ({"ffn_hidden_size": 128}, "config_invalid", "mlp.dense_h_to_4h.weight"),
        ({"multi_query_group_num": 1}, "config_invalid", "query_key_value.weight"),
        ({"padded_vocab_size": 448}, "config_invalid", "word_embeddings.weight"),
    ],
)
def test_bad_configs(changes: dict[str, Any], code: str, says: str, model_file: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model", model_file)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(PruningError) as caught:
        prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    assert caught.value.code == code and says in caught.value.message
    assert caught.value.field == "model_id" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [f"{LAYER}.mlp.dense_4h_to_h.weight", "transformer.output_layer.weight"])
def test_a_missing_tensor(name: str, model_file: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model", model_file)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    file = tmp_path / "model" / index["weight_map"].pop(name)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(PruningError) as caught:
        prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    assert caught.value.code == "weights_missing" and name in caught.value.message
