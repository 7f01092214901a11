"""The encoder-decoder prior: a caption is encoded once, and image tokens attend to it."""
