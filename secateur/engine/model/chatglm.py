"""ChatGLM models, loaded from the files of their own repositories without running the repositories' code.

The first ChatGLM-6B is loaded as our class ``chatglm6b``, whose tensors have the published names. ChatGLM2, ChatGLM3
and GLM-4 are loaded as transformers' ``glm``; their files give the weights other names and store query, key and value
as one tensor. The tokenizer is a SentencePiece model. Only the repositories' code knows its control tokens and, for the
first ChatGLM, its signs for white space, so this module defines both.
"""

import json
import re
from typing import Any

import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from secateur.catalog.sources import ModelSource, check_weight_files
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.modeling_chatglm6b import ChatGLM6BConfig, ChatGLM6BForCausalLM

NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
LAYER_NAMES = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYERS, SOURCE_LAYERS = "model.layers.", "transformer.encoder.layers."
FIRST_LAYERS = "transformer.layers."
COMPUTED = "rotary_emb.inv_freq"
"""Ending of the name of a tensor in the files whose values also follow from the config."""

CONTROL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""Control tokens whose ids follow the SentencePiece vocabulary. ChatGLM's code writes "sop" and "eop" without brackets;
as tokens, these strings would match inside ordinary words ("philosophy"). ChatGLM2 has only the first five tokens, but
has embeddings for all of them."""

FIRST_FILE = "ice_text.model"
FIRST_CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
SIGNS = {
    "\n": "<n>",
    "\t": "<|tab|>",
    **{" " * count: f"<|blank_{count}|>" for count in range(80, 1, -1)},
}
"""Signs by which the first ChatGLM replaces white space, in the order in which ChatGLM's code replaces it."""

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
"""Kinds of SentencePiece pieces."""
PROBES = (
    "The river  rose by 3.5 metres (about 11 ft) in 1997; nobody's house was spared!",
    "  def f(x): \n    if x:\n\treturn {'a': x ** 2}\r\n\n ",
    " 清华大学 KEG 实验室和智谱 AI 联合训练的模型，\u3000ＡＢＣ１２３。",
    "Ĉiuĵaŭde naïve façade — Ωμέγα Привет مرحبا 😀 e\u0301",
)
PIECES_A_PROBE = 256


def load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model; only one tensor of the files is read at a time.

    Raises:
        PruningError: ``weights_missing`` or ``config_invalid``; the message has the tensor's name in the file.
    """
    assert source.path is not None and source.config is not None
    first = source.config["model_type"] == ChatGLM6BConfig.model_type
    with no_init_weights():
        if first:
            model = ChatGLM6BForCausalLM._from_config(ChatGLM6BConfig(**source.config), dtype=dtype)
        else:
            model = GlmForCausalLM._from_config(GlmConfig(**source.config), dtype=dtype)
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    files = check_weight_files(source.model_id, source.path)
    wanted: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        wanted.setdefault(name if first else _glm_source_name(name), []).append(tensor)
    for name, parts in wanted.items():
        if name not in files:
            raise PruningError(
                ErrorCode.WEIGHTS_MISSING, f"{source.model_id} lacks the tensor {name}.", field="model_id"
            )
        with safe_open(files.pop(name), framework="pt") as file:
            _fill(parts, file.get_tensor(name), name, source.model_id)
    layers = FIRST_LAYERS if first else SOURCE_LAYERS
    if beyond := sorted(name for name in files if name.startswith(layers) and not name.endswith(COMPUTED)):
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"The config of {source.model_id} has no place for its tensor {beyond[0]}.",
            field="model_id",
        )
    loaded: PreTrainedModel = model
    return loaded


def _glm_source_name(name: str) -> str:
    """Return the file's name of the tensor that holds the parameter ``name`` of ``glm``."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(LAYERS):
        return f"{NAMES[module]}.{kind}"
    index, _, module = module.removeprefix(LAYERS).partition(".")
    within = "self_attention.query_key_value" if module in QUERY_KEY_VALUE else LAYER_NAMES.get(module, module)
    return f"{SOURCE_LAYERS}{index}.{within}.{kind}"


def _fill(parts: list[Tensor], tensor: Tensor, name: str, model_id: str) -> None:
    """Copy the rows of ``tensor`` into ``parts``, one part after the other.

    Raises:
        PruningError: ``config_invalid`` when the shape of ``tensor`` is not the one that the parts need.
    """
    rows = [len(part) for part in parts]
    wanted = [sum(rows), *parts[0].shape[1:]]
    if list(tensor.shape) != wanted:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"The tensor {name} of {model_id} is {list(tensor.shape)}, and its config makes it {wanted}.",
            field="model_id",
        )
    for part, own in zip(parts, tensor.split(rows), strict=True):
        part.copy_(own)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load the tokenizer from ``tokenizer.json``, or else build it from the SentencePiece model.

    A tokenizer that is built is checked against the SentencePiece model.

    Raises:
        ValueError: both files are missing, the SentencePiece model does something that ``tokenizers`` cannot do, or its
            tokens differ from the config's.
    """
    assert source.path is not None and source.config is not None
    folder, first = source.path, source.config["model_type"] == ChatGLM6BConfig.model_type
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        kept = ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "chat_template")
        named = {key: written[key] for key in kept if isinstance(written.get(key), str)}
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the class is created at import
    name = FIRST_FILE if first else "tokenizer.model"
    try:
        proto.ParseFromString((folder / name).read_bytes())
        if first:
            _add_first_pieces(proto)
        processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:
        raise ValueError(
            f"{name} is no SentencePiece model, and its repository's own code is not run: put a tokenizer.json beside it"
        ) from error
    tokenizer = _from_sentencepiece(proto, first)
    _check(tokenizer, processor, proto, first)
    if first:
        if (begins := tokenizer.token_to_id("<sop>")) != source.config["bos_token_id"]:
            raise ValueError(
                f"{name} puts the beginning of a sequence at {begins}, the config at {source.config['bos_token_id']} "
                "(the first release had 20,000 tokens of images before the text's): put a tokenizer.json beside it"
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<sop>",
            eos_token="<eop>",
            unk_token=proto.trainer_spec.unk_piece,
            pad_token=processor.id_to_piece(source.config.get("pad_token_id") or 0),
            mask_token="[MASK]",
            padding_side="left",
        )
    template = written.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<sop>",
        eos_token=proto.trainer_spec.eos_piece,
        unk_token=proto.trainer_spec.unk_piece,
        pad_token=proto.trainer_spec.unk_piece,
        padding_side="left",
        chat_template=template.replace("[gMASK]sop", "[gMASK]<sop>") if isinstance(template, str) else None,
    )


def _add_first_pieces(proto: Any) -> None:
    """Add the pieces that the first ChatGLM's code adds: control tokens, signs for white space, and bytes."""
    _, tab, *blanks = SIGNS.values()  # the model already has a piece for the first sign, a line break
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    added = {CONTROL: FIRST_CONTROL_TOKENS, USER_DEFINED: (tab, *reversed(blanks)), BYTE: of_bytes}
    for kind, pieces in added.items():
        for piece in pieces:
            proto.pieces.add(piece=piece, score=0.0, type=kind)
    proto.trainer_spec.byte_fallback = True


def _signed(text: str) -> str:
    """Return ``text`` with white space replaced by the signs that the first ChatGLM's SentencePiece model expects."""
    for space, sign in SIGNS.items():
        text = text.replace(space, sign)
    return text


def _from_sentencepiece(proto: Any, first: bool) -> Tokenizer:
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    if trained.model_type == trained.BPE:
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                _merges(proto),
                unk_token=trained.unk_piece,
                fuse_unk=True,
                byte_fallback=trained.byte_fallback,
                ignore_merges=first,  # no merge produces the signs
            )
        )
    else:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback))
    signs = SIGNS if first else {}
    steps: list[normalizers.Normalizer] = [normalizers.Replace(space, sign) for space, sign in signs.items()]
    if normalizer.precompiled_charsmap:
        # Precompiled treats "\r\n" as one character, which no map contains; the maps treat "\r" and "\n" alike.
        steps += [normalizers.Replace("\r\n", "\n\n"), normalizers.Precompiled(normalizer.precompiled_charsmap)]
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            *(decoders.Replace(sign, space) for space, sign in signs.items()),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if normalizer.add_dummy_prefix else []),
        ]
    )
    taken = [piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)]
    if first:  # the normalizer makes the signs, after added tokens were searched for in the text
        user_defined = "|".join(re.escape(piece.piece) for piece in taken if piece.type == USER_DEFINED)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(user_defined), "isolated")
        taken = [piece for piece in taken if piece.type == CONTROL]
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL) for piece in taken])
    control, end = (FIRST_CONTROL_TOKENS, "<eop>") if first else (CONTROL_TOKENS, trained.eos_piece)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # The first ChatGLM reads a text as the context of the answer, so the special tokens follow the text.
    single, pair = ("$A [gMASK] <sop>", "$A [gMASK] <sop> $B") if first else ("[gMASK] <sop> $A", "[gMASK] <sop> $A $B")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{pair} {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>", end)],
    )
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return the pairs of pieces that together make a third piece, best score first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    found = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda pair: -pair[0])]


def _check(tokenizer: Tokenizer, processor: SentencePieceProcessor, proto: Any, first: bool) -> None:
    """Check that the tokenizer and the SentencePiece model agree on probe texts of many kinds and on every piece.

    Raises:
        ValueError: the tokenizer and the SentencePiece model differ.
    """
    if tokenizer.get_vocab_size() != len(proto.pieces) + (0 if first else len(CONTROL_TOKENS)):
        raise ValueError(
            "the SentencePiece model has a piece of a control token's name: put a tokenizer.json beside it"
        )
    pieces = [piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)]
    texts = [" ".join(pieces[start : start + PIECES_A_PROBE]) for start in range(0, len(pieces), PIECES_A_PROBE)]
    for text in (*PROBES, *texts):
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        if encoded != processor.encode(_signed(text) if first else text):
            raise ValueError(
                "the SentencePiece model makes tokens that the tokenizers package does not make of it: put a tokenizer.json beside it"
            )
