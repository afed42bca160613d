"""Changes inside a model while it runs. Begin with `patching`, then `ablation`.

- `patching`: `patch`, one component of a source run at a time put into a destination run, and what that changes
- `attribution`: `attribution_patch`, the same to first order by one gradient, with its measured agreement
- `metrics`: what runs are scored by: projections, probes, logits, refusal, or a function of one's own
- `ablation`: `ablate` takes heads, neurons or a direction out; `knock_out` hides tokens from attention
- `steering`: `steer` adds a direction
- `controls`: random heads, sets and directions, and `against_random`, heads judged beside random sets
- `components`: the names of what is patched and ablated, in one table
- `_rows`: how patched runs lie side by side on one shared beginning; what makes `patch` fast

A hook of one's own is `rim.edit`, in `models.hooks`.
"""
