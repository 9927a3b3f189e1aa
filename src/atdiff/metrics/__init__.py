"""The metrics of images, and what they are measured against."""
