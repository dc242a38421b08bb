"""Pretrained weights: read from the usual files, renamed per model family, merged strictly.

`locate.load` is the way in; `export.write` the way out.
"""
