"""The pruning engine: from a model and a resolved request to a smaller model. It needs no service."""

import os

# Threads of torch that wait for one another sleep instead of spinning: beside another busy process, a run otherwise takes a third
# longer. The variable counts only if it is set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
