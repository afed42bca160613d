"""Suites: which checkpoint plays which role, where its weights are, and whether they fit. Nothing here loads torch.

Read first `schema`.

- `schema`: a suite's YAML file, `rim.load_suite`, and what identifies its models.
- `checkpoints`: where a checkpoint or an adapter lies (folder, hub, `.gguf`), and what its small files and headers say.
- `preflight`: whether a suite can work, and how to build a role that it lacks.
- `sizing`: memory and time by arithmetic.
- `weights`, `gguffiles`: weights from the package index and from `.gguf` files, converted once.
- `chattemplate`: a chat template of a suite's own, tried on a message.
"""
