"""Suites: which checkpoint plays which role, where its weights are, and whether they fit."""
