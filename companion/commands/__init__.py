"""What each command of `rim` prints and asks."""
