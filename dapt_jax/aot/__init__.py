"""Ahead-of-time compilation of a study's steps for a TPU topology; nothing else imports this package."""
