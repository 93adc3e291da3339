"""`mmtrain compose`: an image encoder and a language model become one image-text model with a new projector."""
