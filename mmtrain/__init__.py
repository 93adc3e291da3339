"""mmtrain: fine-tune vision-language models on your own image-text conversations."""

__version__ = "0.1.0"
