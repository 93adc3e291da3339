"""Training by the contrastive objective."""
