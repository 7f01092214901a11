"""One queue for a device, a page and the image API on top of it."""
