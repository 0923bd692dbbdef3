"""Data sets: texts and chats that clients upload, for calibration and evaluation."""
