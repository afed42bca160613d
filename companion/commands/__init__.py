"""What each command of `rim` does, one function a command; `companion.cli` has their options.

`run`: run notebooks, build the book. `results`: claims, what differs between two runs, the crate to publish. `suite`:
make, check, show and list suites. `organisms`: list, check and train the small models of a suite.
"""
