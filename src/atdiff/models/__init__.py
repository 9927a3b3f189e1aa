"""Networks: presets by name, and the import of published checkpoints."""
