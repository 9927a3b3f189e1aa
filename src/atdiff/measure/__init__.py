"""Measurements of trained models: metrics by cell, mismatch, robustness and directions."""
