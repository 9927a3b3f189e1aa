"""Metrics of generated images, and the reference data that they are measured against."""
