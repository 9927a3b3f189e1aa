"""Errors, the forward process, predictions, norms and timesteps: what everything else speaks in."""
