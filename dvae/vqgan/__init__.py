"""VQGANs: taming-transformers', Sber's, DALL·E mini's, minDALL-E's, LlamaGen's."""
