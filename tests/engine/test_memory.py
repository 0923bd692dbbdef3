"""A model need not fit in memory: its files are mapped, and its cut layers are held in files, too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.engine.model import layer_files
from secateur.engine.model.layer_files import LayerFiles
from tests.engine.models import SIZES, save

PRUNE = """
import sys, threading, time
from pathlib import Path
import torch
from secateur.catalog.spec import PruningSpec
from tests.engine.running import prune

torch.set_num_threads(1)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
source, out = sys.argv[1:]
text = {"samples": 4, "sequence_length": 32}
spec = PruningSpec(
    target_ratio=0.3, method="secateur", calibration=text, evaluation={**text, "latency": False}
)
prune(source, spec, Path(out))
print(peak - before)
"""


def test_memory_holds_no_more_than_a_few_layers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Pages of files, which the kernel may drop and read again, are not counted."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes, "num_key_value_heads": 4}))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    source = save(model, tokenizer, tmp_path / "source", max_shard_size="20MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", PRUNE, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.6 * weights, "seven tenths of them stay"


def test_a_held_layer_computes_the_same_and_leaves_no_file(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.bfloat16))
    layer[1].weight = layer[0].weight
    before, inputs = [each.detach().clone() for each in layer.parameters()], torch.ones(1, 8, dtype=torch.bfloat16)
    expected = layer(inputs)
    LayerFiles(tmp_path).hold(layer)
    assert torch.equal(layer(inputs), expected) and layer[1].weight is layer[0].weight
    assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), before, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_stays_in_memory_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 4)
    weight = layer.weight

    def full(number: int) -> None:
        raise OSError(number, "it cannot be written")

    for number in layer_files.FULL:
        monkeypatch.setattr(layer_files, "save_file", lambda tensors, file, number=number: full(number))
        LayerFiles(tmp_path).hold(layer)
        assert layer.weight is weight
    monkeypatch.setattr(layer_files, "save_file", lambda tensors, file: full(5))
    with pytest.raises(OSError, match="it cannot be written"):
        LayerFiles(tmp_path).hold(layer)
