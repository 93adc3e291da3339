"""What several test files share: models, data, runs in processes of their own."""
