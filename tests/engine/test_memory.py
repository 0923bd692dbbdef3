"""A model need not fit in memory: its files are mapped, and its cut layers are held in files, too."""

import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
