"""``dsgp``, dynamic pruning: a published model that prunes itself for each prompt.

This package calibrates and writes the model, which then runs without this project.
"""
