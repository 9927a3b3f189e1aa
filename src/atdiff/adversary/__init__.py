"""Adversarial training: perturbations of the input, and the passes that they share with the weights."""
