"""mmtrain: teach a vision-language model from your own image-text chats."""

__version__ = "0.1.0"
