"""The first ChatGLM-6B from the files of its own repository, with none of its code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.catalog.sources import locate, read_shape
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.measure.texts import sample_windows
from secateur.engine.model.decoder import Decoder, token_losses
from secateur.engine.model.loading import load
from secateur.engine.model.modeling_chatglm6b import ChatGLM6BForCausalLM
from tests.engine.models import english
from tests.engine.running import prune
from tests.engine.test_chatglm import sentencepiece

PIECES = 440
MASK, GMASK, BEGIN, END = PIECES, PIECES + 1, PIECES + 4, PIECES + 5
CONFIG: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": 3,
    "hidden_size": 48,
    "inner_hidden_size": 160,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 256,
    "model_type": "chatglm",
    "num_attention_heads": 6,
    "num_layers": 3,
    "position_encoding_2d": True,
    "quantization_bit": 0,
    "torch_dtype": "float32",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 800,
}
LAYER = "transformer.layers.1"
ASKED = PruningSpec.model_validate(
    {
        "target_ratio": 0.3,
        "method": "secateur",
        "calibration": {"texts": english("calibration"), "samples": 8, "sequence_length": 32},
        "evaluation": {
            "texts": english("evaluation"),
            "sequence_length": 32,
            "samples": 4,
            "latency": False,
            "prompts": [],
        },
    }
)


def random_weights() -> dict[str, Tensor]:
    """Under the published names, large enough that every unit matters."""
    generator = torch.Generator().manual_seed(0)
    hidden, channels, vocabulary = CONFIG["hidden_size"], CONFIG["inner_hidden_size"], CONFIG["vocab_size"]
    modules = {"transformer.final_layernorm": (hidden,)}
    for index in range(CONFIG["num_layers"]):
        modules |= {
            f"transformer.layers.{index}.{name}": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "attention.query_key_value": (3 * hidden, hidden),
                "attention.dense": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.dense_h_to_4h": (channels, hidden),
                "mlp.dense_4h_to_h": (hidden, channels),
            }.items()
        }
    weights = {"transformer.word_embeddings.weight": torch.randn(vocabulary, hidden, generator=generator)}
    weights["lm_head.weight"] = torch.randn(vocabulary, hidden, generator=generator) * 0.2
    for name, shape in modules.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
    for index in range(CONFIG["num_layers"]):
        weights[f"transformer.layers.{index}.attention.rotary_emb.inv_freq"] = torch.ones(2, dtype=torch.float16)
    return weights


def chatglm6b(weights: dict[str, Tensor], text: list[int]) -> Tensor:
    """Logits ``[length, vocabulary]`` of one text, written from the published architecture; rotated by complex numbers."""
    size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    context, length = text.index(BEGIN), len(text)
    mask = text.index(GMASK if GMASK in text else MASK)
    places = [[index, 0] if index < context else [mask, index - context + 1] for index in range(length)]
    frequencies = torch.tensor([float(torch.tensor(10000 ** (-4 * pair / size)).half()) for pair in range(size // 4)])
    angles = torch.tensor(places)[..., None] * frequencies  # [length, 2, size / 4]
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    hears = [[other <= one or other < context for other in range(length)] for one in range(length)]

    def rotate(states: Tensor) -> Tensor:
        """Of ``[length, heads, size]`` each half, its first quarter with its second as real and imaginary parts."""
        real, imaginary = states.unflatten(-1, (2, 2, -1)).unbind(-2)
        turned = torch.complex(real, imaginary) * turns
        return torch.stack([turned.real, turned.imag], -2).flatten(-3)

    def apply(name: str, states: Tensor) -> Tensor:
        return linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, states: Tensor) -> Tensor:
        return layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    hidden = weights["transformer.word_embeddings.weight"][text]
    for index in range(CONFIG["num_layers"]):
        layer = f"transformer.layers.{index}"
        entering = norm(f"{layer}.input_layernorm", hidden)
        heads = apply(f"{layer}.attention.query_key_value", entering).unflatten(-1, (-1, 3 * size))
        query, key, value = heads.split(size, -1)
        scores = torch.einsum("qhd,khd->hqk", rotate(query), rotate(key)) / math.sqrt(size)
        shares = scores.masked_fill(~torch.tensor(hears), -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
        entering = norm(
            f"{layer}.post_attention_layernorm",
            math.sqrt(56) * entering + apply(f"{layer}.attention.dense", attended),
        )
        wide = apply(f"{layer}.mlp.dense_h_to_4h", entering)
        wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        hidden = math.sqrt(56) * entering + apply(f"{layer}.mlp.dense_4h_to_h", wide)
    return linear(norm("transformer.final_layernorm", hidden), weights["lm_head.weight"])


@pytest.fixture(scope="module")
def model_file() -> bytes:
    return sentencepiece(
        model_type="unigram",
        byte_fallback=False,
        user_defined_symbols=["<n>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
    )


def write(folder: Path, model: bytes, **changes: Any) -> dict[str, Tensor]:
    """A repository as published; its weights."""
    weights = random_weights()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, "do_lower_case": False})
    )
    (folder / "ice_text.model").write_bytes(model)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('this code must not run')\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.fixture(scope="module")
def folder(model_file: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm6b") / "model"
    write(folder, model_file)
    return folder


def opened(folder: Path) -> Decoder:
    return load(locate(str(folder), allow_paths=True), "auto")


def texts(*lengths: tuple[int, int, int]) -> list[list[int]]:
    """One for each ``(context, mask token, answer)``: the mask ends the context."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for context, mask, answer in lengths:
        words = torch.randint(4, PIECES, (context + answer,), generator=generator).tolist()
        made.append([*words[:context], mask, BEGIN, *words[context:]])
    return made


@pytest.mark.parametrize("text", texts((0, GMASK, 30), (20, GMASK, 10), (30, GMASK, 0), (12, MASK, 18)))
def test_it_computes_what_chatglm_does(text: list[int], folder: Path) -> None:
    decoder, expected = opened(folder), chatglm6b(load_file(folder / "model.safetensors"), text)
    assert expected.std() > 0.5
    logits = decoder.model(torch.tensor([text])).logits[0]
    assert torch.allclose(logits, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    numbers = sum(weight.numel() for name, weight in random_weights().items() if "rotary" not in name)
    assert read_shape(locate(str(folder), allow_paths=True)).parameters == decoder.parameters == numbers


def test_a_mask_within_the_context(folder: Path) -> None:
    (text,) = texts((12, MASK, 18))
    text[5], text[12] = MASK, 7
    expected = chatglm6b(load_file(folder / "model.safetensors"), text)
    logits = opened(folder).model(torch.tensor([text])).logits[0]
    assert torch.allclose(logits, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_it_writes_the_same_with_every_cache_and_in_a_padded_batch(folder: Path) -> None:
    model, weights = opened(folder).model, load_file(folder / "model.safetensors")
    short, long = texts((4, GMASK, 2), (11, GMASK, 3))
    wanted = []
    for text in (short, long):
        written = list(text)
        for _ in range(8):
            written.append(int(chatglm6b(weights, written)[-1].argmax()))
        wanted.append(written[len(text) :])
    batch = torch.tensor([[3] * (len(long) - len(short)) + short, long])
    mask = torch.ones_like(batch)
    mask[0, : len(long) - len(short)] = 0
    options: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    for option in options:
        written = model.generate(
            batch, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **option
        )
        assert written[:, batch.shape[1] :].tolist() == wanted
    beams = model.generate(batch, attention_mask=mask, max_new_tokens=8, num_beams=2, eos_token_id=None)
    assert beams.shape == (2, batch.shape[1] + 8)
    with pytest.raises(ValueError, match="position_ids"):
        model(batch[:, -1:], past_key_values=model(batch[:, :-1]).past_key_values)


def test_a_pruned_one_comes_with_its_class(folder: Path, tmp_path: Path) -> None:
    report = prune(str(folder), ASKED, tmp_path / "out").report
    assert report["source"]["family"] == "chatglm6b" and report["ratio"]["reached"] == pytest.approx(0.3, abs=0.02)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["PrunedChatGLM6BForCausalLM"]
    assert {file.name for file in (tmp_path / "out").glob("*.py")} == {"modeling_pruned.py", "modeling_chatglm6b.py"}
    assert "chatglmtok" not in (tmp_path / "out" / "tokenizer_config.json").read_text().lower()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer("The river rose.", return_tensors="pt")
    assert asked.input_ids[0, -2:].tolist() == [GMASK, BEGIN]
    assert model.generate(**asked, max_new_tokens=4, min_new_tokens=4).shape[1] == asked.input_ids.shape[1] + 4


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_layouts_of_equal_layers_come_with_the_class_alone(layout: str, folder: Path, tmp_path: Path) -> None:
    changes = {"layout": layout, "method": "magnitude", "target_ratio": 0.4}
    prune(str(folder), PruningSpec.model_validate({**ASKED.model_dump(), **changes}), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.py")] == ["modeling_chatglm6b.py"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len({tuple(layer.mlp.dense_h_to_4h.weight.shape) for layer in model.transformer.layers}) == 1


def test_windows_begin_with_what_the_model_expects(folder: Path) -> None:
    decoder = opened(folder)
    assert decoder.opening.tolist() == [GMASK, BEGIN]
    tokens = sample_windows(decoder, 3, 12, 0, lambda share: None)
    assert tokens.shape == (3, 12) and tokens[:, :2].tolist() == [[GMASK, BEGIN]] * 3
    logits = decoder.model(tokens).logits
    assert torch.equal(decoder.losses(logits, tokens), token_losses(logits, tokens)[:, 1:])
    assert decoder.losses(logits, tokens).numel() == decoder.predicted(tokens) == 30


def test_the_tokenizer_is_the_published_one(folder: Path, model_file: bytes) -> None:
    tokenizer = opened(folder).tokenizer
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model_file)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    added = [(name, 3) for name in names]
    added += [(name, 4) for name in ("<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81)))]
    added += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    for piece, kind in added:
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    proto.trainer_spec.byte_fallback = True
    published = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def signed(text: str) -> str:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for count in range(80, 1, -1):
            text = text.replace(" " * count, f"<|blank_{count}|>")
        return text

    samples = ["  def f(x):\n\tif x:\n" + " " * 200 + "y\n\n", "\t 清华 😀 naïve\r\n", *english("evaluation")]
    for text in samples:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == published.encode(signed(text))
        assert tokenizer.decode(ids) == text
    assert tokenizer("x").input_ids[-2:] == [GMASK, BEGIN]
    assert tokenizer("x", "y").input_ids[-1] == END
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (END, 3, "left")


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"position_encoding_2d": False}, "unsupported_architecture", "'position_encoding_2d' is false"),
        ({"pre_seq_len": 128}, "unsupported_architecture", "'pre_seq_len' is 128"),
        ({"eva_config": {"hidden_size": 8}}, "unsupported_architecture", "'eva_config'"),
        ({"quantization_bit": 4}, "weights_quantized", "quantised"),
        ({"num_attention_heads": 8}, "config_invalid", "'num_attention_heads' is 8"),
        ({"gmask_token_id": None}, "config_invalid", "'gmask_token_id'"),
        ({"inner_hidden_size": "160"}, "config_invalid", "'inner_hidden_size'"),
        ({"num_layers": 2}, "config_invalid", "transformer.layers.2."),
        ({"num_layers": 4}, "weights_missing", "transformer.layers.3."),
        ({"inner_hidden_size": 128}, "config_invalid", "mlp.dense_h_to_4h.weight"),
        ({"vocab_size": 700}, "config_invalid", "word_embeddings.weight"),
        ({"bos_token_id": 150004}, "tokenizer_missing", "20,000 tokens of images"),
    ],
)
def test_bad_configs(changes: dict[str, Any], code: str, says: str, model_file: bytes, tmp_path: Path) -> None:
    write(tmp_path / "model", model_file, **changes)
    with pytest.raises(PruningError) as caught:
        prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    assert caught.value.code == code and says in caught.value.message
    assert caught.value.field == "model_id" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [f"{LAYER}.attention.query_key_value.bias", "lm_head.weight"])
def test_a_missing_tensor(name: str, model_file: bytes, tmp_path: Path) -> None:
    weights = write(tmp_path / "model", model_file)
    del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match=name) as caught:
        prune(str(tmp_path / "model"), ASKED, tmp_path / "out")
    assert caught.value.code == "weights_missing" and not (tmp_path / "out").exists()


def test_training_goes_through_it(folder: Path) -> None:
    model = opened(folder).model.requires_grad_(True)
    assert isinstance(model, ChatGLM6BForCausalLM)
    tokens = torch.tensor(texts((0, GMASK, 20)))
    output = model(tokens, labels=tokens)
    assert torch.isclose(output.loss, token_losses(output.logits, tokens).mean())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
