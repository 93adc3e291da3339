"""`mmtrain init`: a first config for a model, data and the device at hand."""
