"""Embedded demonstration data: packages' own images, sounds and clips, a small backbone, encoders and tasks."""
