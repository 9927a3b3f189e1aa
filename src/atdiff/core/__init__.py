"""Errors, the forward process, predictions, norms and timesteps, which everything else builds on."""
