"""Models on the Hugging Face Hub: fetched by name into its cache, and uploaded.

The package huggingface_hub, which speaks its protocol, is imported when the network is asked for
and not before. Nothing that a repository says is believed before it is checked.
"""
