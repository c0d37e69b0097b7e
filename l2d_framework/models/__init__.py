"""What users hold, save, load and convert."""
