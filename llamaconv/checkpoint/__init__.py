"""A checkpoint as named rectangles of bytes, opened from headers."""
