"""Claims of the papers, decided by rules that are written down before the run.

Read first `deciding`.

- `deciding`: `rim.claims(paper).record(...)`, and `decide`: a claim's values over seeds become an `Outcome`.
- `rules`: the pure functions under it, from values to a `Finding`.
- `schema`: what a file of `book/claims/` holds, and every kind of rule.
"""
