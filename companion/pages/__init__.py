"""From results to the pages of the book; read `staging` first.

- `staging`: executed notebooks as pages, and the tables, written into `book/experiments/`.
- `runcard`: what a page's result came from; `scorecard`, `measured`: the texts that the book's own pages include, made
  of the parts in `markup`.
- `build`: Jupyter Book, run over what was staged.
"""
