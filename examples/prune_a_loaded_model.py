# %% [markdown]
# # From a loaded model to a saved one
#
# This script is a notebook in cells (`# %%`), as editors and Jupyter with jupytext open it. It also runs as a program:
#
#     python examples/prune_a_loaded_model.py MODEL OUTPUT
#
# MODEL is a Hub id or a folder. `pip install 'secateur[engine]'` installs what it needs.

# %%
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import prune

MODEL, OUTPUT = sys.argv[1], Path(sys.argv[2])

# %% [markdown]
# Load the model as you always do. Calibration text of your own domain makes the best model; a few thousand tokens are enough.

# %%
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
texts = [path.read_text() for path in sorted(Path(__file__).parents[1].glob("demo/calibration/*.txt"))]
parameters = model.num_parameters()

# %% [markdown]
# Prune the model in place. The report has what was measured before and after.

# %%
result = prune(
    model,
    tokenizer=tokenizer,
    ratio=0.3,
    method="secateur",
    data=texts,
    recipe={"evaluation": {"samples": 8, "sequence_length": 64, "latency": False}},
)
print(f"{parameters:,} parameters before, {model.num_parameters():,} after")
print(f"perplexity {result.report.perplexity.before:.2f} before, {result.report.perplexity.after:.2f} after")

# %% [markdown]
# The model in memory is an ordinary transformers model.

# %%
inputs = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(result.model.generate(**inputs, max_new_tokens=12)[0], skip_special_tokens=True))

# %% [markdown]
# Save it. A process that does not have this project loads the files and must compute the same logits before they count.

# %%
result.save(OUTPUT)
again = AutoModelForCausalLM.from_pretrained(OUTPUT, trust_remote_code=True)
print(f"saved and loaded again: {again.num_parameters():,} parameters in {OUTPUT}")
