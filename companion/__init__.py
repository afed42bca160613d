"""The machine: the command `rim`, which runs notebooks, keeps their results and builds the book."""
