"""Pretrained weights: read from the usual formats, renamed per model family, merged strictly.

`locate.load` reads weights; `export.write` writes them.
"""
