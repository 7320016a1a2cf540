"""The pictures of the page, one module per section; each function returns a `Figure`."""
