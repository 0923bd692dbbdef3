"""What is written loads with plain transformers, in a process that has never seen this project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from app.catalog.errors import PruningError
from app.catalog.sources import locate
from tests.engine.models import FAMILIES, VOCABULARY, make_model, save
from tests.engine.test_slicing import some_plan
from workers.engine import PruningSpec
from workers.engine.decoder import Decoder
from workers.engine.export import check_checkpoint, checkpoint
from workers.engine.loading import load
from workers.engine.plan import Plan
from workers.engine.slicing import apply_plan

STRANGER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, probe, out = sys.argv[1:]
torch.set_num_threads(1)
tokens = load_file(probe)["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
results = {
    "logits": model(tokens).logits.float().contiguous(),
    "hidden": AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state.float().contiguous(),
    "dynamic": model.generate(tokens, **options),
    "none": model.generate(tokens, use_cache=False, **options),
    "static": model.generate(tokens, cache_implementation="static", **options),
}
padded = torch.cat([torch.zeros(len(tokens), 3, dtype=tokens.dtype), tokens], 1)
mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
results["left_padded"] = model.generate(padded, attention_mask=mask, **options)[:, 3:]
model.set_attn_implementation("eager")
results["eager"] = model(tokens).logits.float().contiguous()
model.save_pretrained(out + "-resaved")
again = AutoModelForCausalLM.from_pretrained(out + "-resaved", trust_remote_code=True, dtype="auto").eval()
results["resaved"] = again(tokens).logits.float().contiguous()
assert not any(name.split(".")[0] in ("app", "workers") for name in sys.modules)
save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
"""


def report_of(decoder: Decoder, plan: Plan) -> dict[str, object]:
    pair = {"before": 2, "after": 1}
    spec = PruningSpec(target_ratio=0.4, method="magnitude")
    return {
        "source": {"model_id": "org/base", "revision": "abc"},
        "spec": spec.published(),
        "ratio": {"target": 0.4, "reached": 0.41},
        **dict.fromkeys(("parameters", "weights_bytes", "flops", "perplexity"), pair),
        "latency": {"before": None, "after": None},
        "widths": {
            "before": Plan.full(decoder.shape.layers).widths(decoder.shape),
            "after": plan.widths(decoder.shape),
        },
        "calibration": {"windows": 1, "sequence_length": 8, "source": "x"},
        "evaluation": {"tokens": 8, "source": "x"},
        "rounds": [],
        "dtype": "float32",
    }


@pytest.mark.parametrize("name", [*FAMILIES, "bfloat16", "sharded"])
def test_a_stranger_can_load_it(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name if name in FAMILIES else "llama")
    if name == "bfloat16":
        model = model.bfloat16()
    if name == "sharded":
        monkeypatch.setattr(checkpoint, "SHARD_SIZE", "100KB")
    folder = save(model, tokenizer, tmp_path / "source", **({"max_shard_size": "100KB"} if name == "sharded" else {}))
    source = locate(str(folder), allow_paths=True)
    decoder = load(source, "auto", torch.device("cpu"))
    plan = some_plan(decoder.layers[0].kv_groups)
    apply_plan(decoder, plan)
    out = tmp_path / "pruned"
    out.mkdir()
    checkpoint.write_checkpoint(decoder, source, plan, out, report_of(decoder, plan), {"job_id": "j", "repo_id": "o/n"})
    check_checkpoint(decoder, out)
    if name == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 1 and len(list(out.glob("*.safetensors"))) > 1

    tokens = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    expected = decoder.model(tokens).logits.float()
    save_file({"tokens": tokens}, tmp_path / "probe")
    command = [sys.executable, "-I", "-c", STRANGER, str(out), str(tmp_path / "probe"), str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results")
    scale = float(expected.abs().max())
    if name == "bfloat16":
        assert torch.allclose(results["logits"], expected, atol=0.02 * scale)
        return
    assert torch.allclose(results["logits"], expected, atol=1e-5 * scale)
    assert torch.allclose(results["eager"], expected, atol=1e-4 * scale)
    assert torch.equal(results["resaved"], results["eager"]) or torch.equal(results["resaved"], results["logits"])
    for kind in ("none", "static", "left_padded"):
        assert torch.equal(results[kind], results["dynamic"]), kind

    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"]["2"]["num_key_value_heads"] == 1
    assert config["head_dim"] == decoder.shape.layers[0].head_dim
    assert config["model_type"] == decoder.model.config.model_type
    manifest = json.loads((out / "secateur.json").read_text())
    assert Plan.from_dict(manifest["plan"]) == plan and manifest["job_id"] == "j"
    assert set(manifest["files"]) == {file.name for file in out.iterdir()} - {"secateur.json"}


def test_a_checkpoint_that_disagrees_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save(make_model("llama"), tokenizer, tmp_path / "source")
    source = locate(str(folder), allow_paths=True)
    decoder = load(source, "auto", torch.device("cpu"))
    plan = some_plan(3)
    apply_plan(decoder, plan)
    out = tmp_path / "pruned"
    out.mkdir()
    checkpoint.write_checkpoint(decoder, source, plan, out, report_of(decoder, plan), {})
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"].flip(0).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match="logits differ") as caught:
        check_checkpoint(decoder, out)
    assert caught.value.code == "export_invalid"
    del weights["model.norm.weight"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match="do not fit"):
        check_checkpoint(decoder, out)
