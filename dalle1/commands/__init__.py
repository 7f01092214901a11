"""The command `dalle1 VERB`: one module a verb, each with a `main` that returns an exit status."""
