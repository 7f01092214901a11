"""An encoder-decoder prior: DALL-E mini and mega (Dayma et al. 2021)."""
