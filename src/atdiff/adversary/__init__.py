"""Adversarial training: input perturbations, and the passes that move them and train the weights."""
