"""Text-to-image pipelines: their data, their networks and their pictures."""
