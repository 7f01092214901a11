"""The Images API that programs speak to a hosted model, on top of the queue; needs the extra
`serve`."""
