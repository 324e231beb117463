"""Which generation, step and guidance branch a call of the denoiser belongs to."""
