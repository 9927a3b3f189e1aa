"""What is measured of trained models: figures by cell, mismatch, robustness and directions."""
