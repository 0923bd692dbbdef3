"""``make demo``: a real model through the real service, and the essays it is calibrated and measured on."""
