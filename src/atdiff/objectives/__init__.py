"""What a network learns; an objective knows nothing of adversaries."""
