"""The machine: the command `rim`, which runs notebooks, keeps their results and builds the book.

Read `cli` first, which has the whole command, then `staleness`, which plans, and `runner`, which runs.

- `commands`: the subcommands of `rim`.
- `staleness`: which notebooks to run, by their keys; `notebooks`: their parameters; `runner`: each result put in place
  whole; `execution`: one run; `forking`: kernels that start quickly; `streams`, `progress`: what it prints; `folders`:
  where it lies; `provenance`: what it rested on.
- `outcomes`: every claim on every suite; `comparison`, `differences`: suites side by side; `crate`: results to share.
- `pages`: from results to pages of the book; `sphinx`: what their builder needs.
- `workflow`: for clusters; `doctor`: what this machine can run.
"""
