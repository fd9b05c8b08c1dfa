"""Everything the notebooks compute, draw and control."""
