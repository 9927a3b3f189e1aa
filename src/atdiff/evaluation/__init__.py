"""Metrics of generated images, and the comparison of training runs."""
