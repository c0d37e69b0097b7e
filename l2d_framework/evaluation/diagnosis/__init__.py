"""Will more steps help? What a diffusion language model's own predictions on held-out text say about it."""
