"""Speed and memory, side by side: the same work by rim_core and by its peers, in turns, in one process."""
