"""``dsgp``: a published model that prunes itself for each prompt. What it needs is found out here; it runs without us."""
