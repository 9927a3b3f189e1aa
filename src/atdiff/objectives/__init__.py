"""Training objectives, which are independent of adversaries."""
