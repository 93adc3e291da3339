"""`mmtrain inspect-model`: what mmtrain finds in a model directory."""
