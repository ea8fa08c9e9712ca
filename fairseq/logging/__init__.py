"""Meters, metrics and the lines that show progress. Nothing here loads torch."""
