"""The cache of frozen encoders' features: extraction, storage, reading."""
