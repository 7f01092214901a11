"""Text tokenizers of other people's models; ours is `dalle1.tokenizer`."""
