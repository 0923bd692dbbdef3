"""Demonstrate the service with a real model, and with essays for calibration and evaluation: ``make demo``."""
