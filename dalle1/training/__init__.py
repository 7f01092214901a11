"""Training of the three stages; the only importers are `launch` and `dalle1.commands.main`."""
