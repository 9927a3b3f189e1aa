"""Trained models as diffusers pipelines: loading, saving, latents, LoRA and model cards."""
