"""A local page that segments pictures in the browser."""
