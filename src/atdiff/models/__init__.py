"""Networks: a preset for every size, and the import of published checkpoints."""
