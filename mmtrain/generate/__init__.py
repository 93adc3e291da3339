"""`mmtrain generate`: replies of a model to questions, in a chat, or to all samples of a file."""
