"""`mmtrain init`: a first config for a model, data and this machine's device."""
