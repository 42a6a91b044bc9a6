"""The students and their training: TMD, its losses, the trainer, samplers and checkpoints."""
