"""Target models: a study's trained heads and decoders with their encoder, on new images.

`target_model` is the file, `calibration` and `familiarity` what it stores beside the weights, `predictor` the
forward pass, `inputs` and `results` the images and the files of `mode=predict`, `stream` what runs it.
"""
