"""The structures that pruning can remove, one file for each."""
