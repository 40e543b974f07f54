"""Fine-tuning and distillation: losses, optimizers and the training loop."""
