"""From a conversation to ids and supervised flags, by the model's own tokenizer and template."""
