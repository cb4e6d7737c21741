"""What leaves moka: merged models, plain LoRA folders, the authors' checkpoints."""
