"""One file for each `dalle1 data VERB`."""
